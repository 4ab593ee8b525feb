-- Decides at the edge whether a request may go on, and to which front.
--
-- Boundary: HAProxy's actions. What a body asks for, `request_body.lua` reads; whether the request
-- gets a ticket, the router decides. It is asked on the ticket socket, one line each way, fields
-- parted by tabs:
--   v1  METHOD  PATH  name=value ...        (the headers below that are present)
--   200  TICKET                             or
--   STATUS  RETRY_AFTER_S or -  MESSAGE  TICKET or -
-- and, when a front failed without telling the client why:
--   why  TICKET
--   STATUS  RETRY_AFTER_S or -  MESSAGE  -     or  -
--
-- Arguments of lua-load: the ticket socket's path, request_body.lua's, tokens of a context, bytes of
-- a body that are surely seen whole, "fast" if there is a fast front, seconds for which a connection
-- to the router is kept for the next question.

local socket_path, body_script, context_tokens, seen_bytes, default_front, idle_s = ...
local ticket_socket = "unix@" .. socket_path
local verdict = dofile(body_script)
context_tokens, seen_bytes, idle_s = tonumber(context_tokens), tonumber(seen_bytes), tonumber(idle_s)

local FIELDS = {
  "content-length", "authorization", "x-api-key", "idempotency-key", "x-baton-priority",
  "x-baton-deadline-ms", "x-baton-ttft-ms", "x-baton-itl-ms", "x-baton-output-tokens",
}
local VALUE_BYTES = 16384 -- As long as all headers may be: of a key every byte tells clients apart.
local PATIENCE_MS = 3000 -- A router that is being restarted is back before.
local PAUSE_MS = 50
local MOST_IDLE = 64     -- A thread keeps no more of them.
local FULL_RETRY_S = "5"

local REASONS = {
  [400] = "Bad Request", [401] = "Unauthorized", [403] = "Forbidden", [404] = "Not Found",
  [409] = "Conflict", [413] = "Payload Too Large", [422] = "Unprocessable Content",
  [429] = "Too Many Requests", [500] = "Internal Server Error", [502] = "Bad Gateway",
  [503] = "Service Unavailable", [504] = "Gateway Timeout",
}
local TYPES = {
  [401] = "authentication_error", [403] = "permission_error", [429] = "rate_limit_error",
}
local MESSAGES_TYPES = {
  [404] = "not_found_error", [413] = "request_too_large", [503] = "overloaded_error",
  [504] = "timeout_error",
}

-- Answers

local function json_string(text)
  return '"' .. text:gsub('[%c"\\\127]', function(character)
    return string.format("\\u%04x", character:byte())
  end) .. '"'
end

-- In OpenAI's form, or in Anthropic's for its clients. The message is JSON already.
local function error_body(anthropic, status, message)
  local kind = TYPES[status]
  if anthropic then
    kind = kind or MESSAGES_TYPES[status] or (status < 500 and "invalid_request_error" or "api_error")
    return string.format('{"type":"error","error":{"type":"%s","message":%s}}', kind, message)
  end
  kind = kind or (status < 500 and "invalid_request_error" or "server_error")
  return string.format(
    '{"error":{"message":%s,"type":"%s","param":null,"code":%d}}', message, kind, status)
end

local function answer_with(txn, anthropic, status, retry_after, message, ticket)
  local reply = txn:reply({ status = status, reason = REASONS[status] or "Error" })
  reply:add_header("Content-Type", "application/json")
  if retry_after:match("^%d+$") then
    reply:add_header("Retry-After", retry_after)
  end
  if ticket then
    reply:add_header("X-Request-Id", ticket)
  end
  reply:set_body(error_body(anthropic, status, message))
  txn:done(reply)
end

-- The router

local idle = {}

local function milliseconds_since(started)
  local now = core.now()
  return (now.sec - started.sec) * 1000 + (now.usec - started.usec) / 1000
end

-- One question on a connection that is kept for the next one. A stream that ends meanwhile takes
-- its connection with it, so that no other gets its answer.
local function ask_on(socket, line, patience_ms)
  -- Of one that was idle for too long HAProxy has let go, which it tells as an error.
  local alive = pcall(function() socket:settimeout(patience_ms / 1000) end)
  if not alive then return nil end
  local answer = socket:send(line) and socket:receive("*l")
  if not answer then
    socket:close()
    return nil
  end
  if #idle < MOST_IDLE then
    socket:settimeout(idle_s)
    idle[#idle + 1] = socket
  else
    socket:close()
  end
  return answer
end

-- The router's answer, or nil if it can't be reached or died before answering.
local function ask(line, patience_ms)
  -- It may have been closed by a router that is gone; then its successor is asked at once.
  local kept = table.remove(idle)
  if kept then return ask_on(kept, line, patience_ms) end
  local socket = core.tcp()
  socket:settimeout(patience_ms / 1000)
  if not socket:connect(ticket_socket) then
    socket:close()
    return nil
  end
  return ask_on(socket, line, patience_ms)
end

-- However often it is asked, a router that hangs costs a request no more than one that is away.
local function ask_patiently(line)
  local started = core.now()
  local waited_ms = 0
  while waited_ms + PAUSE_MS <= PATIENCE_MS do
    local had_idle = #idle > 0
    local answer = ask(line, PATIENCE_MS - waited_ms)
    if answer then return answer end
    if not had_idle then core.msleep(PAUSE_MS) end
    waited_ms = milliseconds_since(started)
  end
  return nil
end

-- A value as valid UTF-8 without control characters, whatever bytes a client sent.
local function harmless(value)
  value = value:gsub("%c", " "):sub(1, VALUE_BYTES)
  if utf8.len(value) then return value end
  value = value:gsub("[\128-\255]", function(byte) return string.format("\\x%02x", byte:byte()) end)
  return value:sub(1, VALUE_BYTES)
end

local function question(path, headers)
  local parts = { "v1", "POST", path }
  for _, name in ipairs(FIELDS) do
    local values = headers[name]
    if values then
      parts[#parts + 1] = name .. "=" .. harmless(values[0])
    end
  end
  return table.concat(parts, "\t") .. "\n"
end

-- Actions

-- Whether a body of which so much is seen is all there; nil if its client has left before its end.
local function is_complete(text, headers)
  local length = headers["content-length"]
  if not length then return #text < seen_bytes end
  if #text >= tonumber(length[0]) then return true end
  if #text < seen_bytes then return nil end
  return false
end

local function is_anthropic(path)
  return path:sub(1, 12) == "/v1/messages"
end

-- The answer if it is a refusal: status, Retry-After or "-", message, and the ticket by which it can
-- be asked for, if it was given one.
local function refusal(answer)
  local pattern = "^([45]%d%d)\t([^\t]*)\t([^\t]*)\t([^\t]*)$"
  local status, retry_after, message, ticket = answer:match(pattern)
  return tonumber(status), retry_after, message, ticket ~= "-" and ticket or nil
end

-- Choose the front (txn.front), and get a ticket (txn.ticket) or answer.
core.register_action("admit", { "http-req" }, function(txn)
  local path, headers = txn.f:path(), txn.http:req_get_headers()
  local text = txn.f:req_body() or ""
  local function refuse(status, retry_after, message, ticket)
    answer_with(txn, is_anthropic(path), status, retry_after, json_string(message), ticket)
  end
  local complete = is_complete(text, headers)
  if complete == nil then return refuse(400, "-", "The body ended before its length.") end
  local front, message = verdict(path, text, complete, context_tokens)
  if message then return refuse(400, "-", message) end
  if default_front == "full" then front = "full" end
  if front == "full" and txn.f:nbsrv("full") == 0 then
    message = "The process that serves this request is starting; try again."
    return refuse(503, FULL_RETRY_S, message)
  end
  local answer = ask_patiently(question(path, headers))
  if not answer then return refuse(503, "1", "The router can't be reached; try again.") end
  local ticket = answer:match("^200\t([%w_.-]+)$")
  if ticket then
    txn:set_var("txn.front", front)
    return txn:set_var("txn.ticket", ticket)
  end
  local status, retry_after, reason, refused = refusal(answer)
  if not status then return refuse(500, "-", "The router's answer can't be read.") end
  refuse(status, retry_after, reason, refused)
end)

-- What the fast front answers with status 500 before it has asked an engine.
local CLIENTS_FAULT = {
  '"message":("failed to submit chat request: chat template error: .-[^\\]")',
  '"message":("failed to submit chat request: tool parsing is disabled .-[^\\]")',
}

-- A front's 5xx: say whose fault it was and what the router knows of it. The argument is the form
-- of errors, "openai" or "anthropic".
core.register_action("explain", { "http-res" }, function(txn, form)
  local anthropic = form == "anthropic"
  local text = txn.f:res_body() or ""
  for _, pattern in ipairs(CLIENTS_FAULT) do
    local message = text:match(pattern)
    if message then return answer_with(txn, anthropic, 400, "-", message) end
  end
  local answer = ask_patiently("why\t" .. txn:get_var("txn.ticket") .. "\n")
  local status, retry_after, message = refusal(answer or "-")
  if status then answer_with(txn, anthropic, status, retry_after, json_string(message)) end
end, 1)
