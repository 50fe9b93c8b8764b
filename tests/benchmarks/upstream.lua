-- What nginx answers in a benchmark, and the books it keeps of it.
--
-- One worker process runs this, so plain variables are the state of the whole server. Each run
-- begins with /reset, whose query describes the endpoint to be; /books says how the run went.
-- Times are ngx.now(), which nginx takes once per event-loop round (milliseconds): the books cost
-- next to nothing, and a client is judged by what arrived here, not by what it says of itself.

local semaphore = require "ngx.semaphore"

local PATIENCE_S = 3600 -- the longest wait for a slot
local ROUNDING = 1e-4 -- of times since 1970 in milliseconds, times a rate
local REFUSAL = '{"object":"error","message":"Requests rate limit exceeded",'
    .. '"type":"rate_limited","param":null,"code":"1300"}'

local M = {}
local reply = ""
local endpoint, books

local function new_books()
    return {
        first = 0, last = 0, in_flight = 0, peak_in_flight = 0,
        requests = 0, answered = 0, refused = 0, answered_by_second = {},
    }
end

function M.reset()
    local arg = function(name) return tonumber(ngx.var["arg_" .. name]) or 0 end
    endpoint = {
        latency_s = arg "latency_s",
        refused_share = arg "refused_share",
        rate_per_s = arg "rate_per_s",
        burst = arg "burst",
        slots = arg "slots",
        queue = arg "queue",
        places = arg "places",
        refusal_status = arg "refusal_status",
        retry_after_s = arg "retry_after_s",
        named_limit = arg "named_limit",
        halved_after_s = arg "halved_after_s",
        -- what changes as requests come
        owed_refusals = 0,
        tokens = arg "burst",
        refilled = 0,
        waiting = 0,
        slots_to_retire = 0,
        free_slots = arg "slots" > 0 and semaphore.new(arg "slots") or nil,
    }
    books = new_books()
end

-- Mistral's headers name a quota a minute and no reset.
local function refused_by_quota(e, now)
    if e.rate_per_s == 0 then return false end
    if e.refilled > 0 then
        e.tokens = math.min(e.burst, e.tokens + (now - e.refilled) * e.rate_per_s)
    end
    e.refilled = now
    local refused = e.tokens < 1 - ROUNDING
    if not refused then e.tokens = math.max(0, e.tokens - 1) end
    ngx.header["x-ratelimit-limit-req-minute"] = e.rate_per_s * 60
    ngx.header["x-ratelimit-remaining-req-minute"] = math.floor(e.tokens)
    return refused
end

-- Every n-th request, not a random one: all clients meet the same.
local function refused_by_turn(e)
    e.owed_refusals = e.owed_refusals + e.refused_share
    if e.owed_refusals < 1 then return false end
    e.owed_refusals = e.owed_refusals - 1
    return true
end

local function refused_by_queue(e)
    return e.queue > 0 and e.waiting >= e.queue
end

local function refused_by_places(e)
    return e.places > 0 and books.in_flight > e.places -- this one included; a refusal takes no time
end

local function work(e)
    if not e.free_slots then
        if e.latency_s > 0 then ngx.sleep(e.latency_s) end
        return
    end
    e.waiting = e.waiting + 1
    e.free_slots:wait(PATIENCE_S) -- first come, first served
    e.waiting = e.waiting - 1
    ngx.sleep(e.latency_s)
    if e.slots_to_retire > 0 then
        e.slots_to_retire = e.slots_to_retire - 1
    else
        e.free_slots:post(1)
    end
end

local function begin(b, e, now)
    if b.requests == 0 then
        b.first = now
        if e.halved_after_s > 0 then
            ngx.timer.at(e.halved_after_s, function()
                e.slots_to_retire = e.slots_to_retire + math.floor(e.slots / 2)
            end)
        end
    end
    b.requests = b.requests + 1
    b.in_flight = b.in_flight + 1
    b.peak_in_flight = math.max(b.peak_in_flight, b.in_flight)
end

local function name_wait(e)
    if e.retry_after_s > 0 then ngx.header["Retry-After"] = e.retry_after_s end
    if e.named_limit > 0 then
        ngx.header["x-ratelimit-limit-requests"] = e.named_limit
        ngx.header["x-ratelimit-remaining-requests"] = 0
    end
end

local function send(status, body)
    ngx.status = status
    ngx.header["Content-Length"] = #body
    ngx.print(body)
end

function M.answer()
    local b, e, now = books, endpoint, ngx.now() -- a straggler of an earlier run keeps its books
    begin(b, e, now)
    if
        refused_by_quota(e, now)
        or refused_by_turn(e)
        or refused_by_queue(e)
        or refused_by_places(e)
    then
        b.refused = b.refused + 1
        name_wait(e)
        send(e.refusal_status, REFUSAL)
    else
        work(e)
        now = ngx.now()
        local second = math.floor(now - b.first)
        b.answered = b.answered + 1
        b.answered_by_second[second] = (b.answered_by_second[second] or 0) + 1
        send(200, reply)
    end
    b.last = now
    b.in_flight = b.in_flight - 1
end

function M.books()
    local by_second = {}
    for second = 0, math.max(0, math.floor(books.last - books.first)) do
        by_second[#by_second + 1] = books.answered_by_second[second] or 0
    end
    ngx.say(string.format(
        '{"first":%.3f,"last":%.3f,"requests":%d,"answered":%d,"refused":%d,'
            .. '"peak_in_flight":%d,"answered_by_second":[%s]}',
        books.first, books.last, books.requests, books.answered, books.refused,
        books.peak_in_flight, table.concat(by_second, ",")
    ))
end

function M.load(path)
    local file = assert(io.open(path, "rb"))
    reply = file:read("*a")
    file:close()
end

return M
