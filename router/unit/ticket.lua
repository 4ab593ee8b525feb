-- Asks the router for a ticket before a request goes to a front.
--
-- Boundary: one short connection per request to the ticket socket (the argument of lua-load), one
-- line each way; fields are parted by tabs:
--   v1  METHOD  PATH  name=value ...        (the headers below that are present)
--   200  TICKET                             or
--   STATUS  RETRY_AFTER_S or -  MESSAGE

local ticket_socket = "unix@" .. ...

local FIELDS = {
  "content-length", "authorization", "idempotency-key", "x-baton-priority", "x-baton-deadline-ms",
  "x-baton-ttft-ms", "x-baton-itl-ms",
}
local VALUE_BYTES = 1024
local PATIENCE_MS = 3000 -- A router that is being restarted is back before.
local PAUSE_MS = 50

local TYPES = {
  [400] = "invalid_request_error", [401] = "authentication_error", [403] = "permission_error",
  [413] = "invalid_request_error", [429] = "rate_limit_error",
}
local REASONS = {
  [400] = "Bad Request", [401] = "Unauthorized", [403] = "Forbidden", [404] = "Not Found",
  [409] = "Conflict", [413] = "Payload Too Large", [422] = "Unprocessable Content",
  [429] = "Too Many Requests", [500] = "Internal Server Error", [503] = "Service Unavailable",
  [504] = "Gateway Timeout",
}

-- A value as valid UTF-8 without control characters, whatever bytes a client sent.
local function harmless(value)
  value = value:gsub("%c", " "):sub(1, VALUE_BYTES)
  if utf8.len(value) then return value end
  value = value:gsub("[\128-\255]", function(byte) return string.format("\\x%02x", byte:byte()) end)
  return value:sub(1, VALUE_BYTES)
end

local function question(txn)
  local headers = txn.http:req_get_headers()
  local parts = { "v1", txn.f:method(), txn.f:path() }
  for _, name in ipairs(FIELDS) do
    local values = headers[name]
    if values then
      parts[#parts + 1] = name .. "=" .. harmless(values[0])
    end
  end
  return table.concat(parts, "\t") .. "\n"
end

-- The router's answer, or nil if it can't be reached or died before answering.
local function ask(line)
  local socket = core.tcp()
  socket:settimeout(PATIENCE_MS / 1000)
  local answer = nil
  if socket:connect(ticket_socket) and socket:send(line) then
    answer = socket:receive("*l")
  end
  socket:close()
  return answer
end

local function ask_patiently(line)
  local started = core.now()
  while true do
    local answer = ask(line)
    if answer then return answer end
    local now = core.now()
    local waited_ms = (now.sec - started.sec) * 1000 + (now.usec - started.usec) / 1000
    if waited_ms + PAUSE_MS > PATIENCE_MS then return nil end
    core.msleep(PAUSE_MS)
  end
end

local function json_string(text)
  return '"' .. text:gsub('[%c"\\\127]', function(character)
    return string.format("\\u%04x", character:byte())
  end) .. '"'
end

local function refuse(txn, status, retry_after, message)
  local reply = txn:reply({ status = status, reason = REASONS[status] or "Error" })
  reply:add_header("Content-Type", "application/json")
  if retry_after:match("^%d+$") then
    reply:add_header("Retry-After", retry_after)
  end
  local kind = TYPES[status] or (status < 500 and "invalid_request_error" or "server_error")
  reply:set_body(string.format(
    '{"error":{"message":%s,"type":"%s","param":null,"code":%d}}',
    json_string(message), kind, status))
  txn:done(reply)
end

core.register_action("ticket", { "http-req" }, function(txn)
  local answer = ask_patiently(question(txn))
  if not answer then
    return refuse(txn, 503, "1", "The router can't be reached; try again.")
  end
  local status, rest = answer:match("^(%d%d%d)\t(.*)$")
  if status == "200" and rest:match("^[%w_.-]+$") then
    txn:set_var("txn.ticket", rest)
    return
  end
  local retry_after, message = (rest or ""):match("^([^\t]*)\t(.*)$")
  if not message or tonumber(status) < 400 then
    return refuse(txn, 500, "-", "The router's answer can't be read.")
  end
  refuse(txn, tonumber(status), retry_after, message)
end)
