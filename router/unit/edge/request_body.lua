-- What the edge reads in a request's body: which front can serve it, and what is refused.
--
-- Boundary: text in, verdict out; it knows nothing of HAProxy. It walks the object's own members
-- and skips their values, so that a schema with a property "n" is no request for two answers.
--
-- The fast front serves what is listed here in a form that it takes; all else goes to the full
-- front, which is vLLM's own server and knows best. So a doubt costs time, never an answer. Fields
-- that neither front knows are ignored by both. Found by sending each field of vLLM 0.32's request
-- types in many forms to both; `tests/router/unit/test_edge_fields.py` holds them against vLLM's.

local byte, find, match, sub = string.byte, string.find, string.match, string.sub
local QUOTE, BACKSLASH = byte('"'), byte("\\")
local OPENS = { [byte("{")] = true, [byte("[")] = true }

-- Where the string that begins at `first` ends; nil if the text ends before.
local function string_end(text, first)
  local from = first + 1
  while true do
    local quote = find(text, '"', from, true)
    if not quote then return nil end
    local before = quote - 1
    while byte(text, before) == BACKSLASH do before = before - 1 end
    if (quote - before) % 2 == 1 then return quote end
    from = quote + 1
  end
end

-- Where the object or list that begins at `first` ends.
local function container_end(text, first)
  local depth, position = 0, first
  while true do
    position = find(text, '["%[%]{}]', position)
    if not position then return nil end
    local character = byte(text, position)
    if character == QUOTE then
      position = string_end(text, position)
      if not position then return nil end
    elseif OPENS[character] then
      depth = depth + 1
    else
      depth = depth - 1
      if depth == 0 then return position end
    end
    position = position + 1
  end
end

local function value_end(text, first)
  local character = byte(text, first)
  if character == QUOTE then return string_end(text, first) end
  if OPENS[character] then return container_end(text, first) end
  local after = match(text, "^[%w.+-]+()", first)
  return after and after - 1
end

local function unescaped(key)
  if not find(key, "\\", 1, true) then return key end
  return (key:gsub("\\u00(%x%x)", function(code) return string.char(tonumber(code, 16)) end))
end

-- Call visit(key, position of the value) for each member of the object at `first`; it returns where
-- the value ends. Returns the object's end, or nil if it has none.
local function each_member(text, first, visit)
  local position = match(text, "^{%s*()", first)
  if not position then return nil end
  if sub(text, position, position) == "}" then return position end
  while true do
    if byte(text, position) ~= QUOTE then return nil end
    local last = string_end(text, position)
    local value = last and match(text, "^%s*:%s*()", last + 1)
    if not value then return nil end
    last = visit(unescaped(sub(text, position + 1, last - 1)), value)
    local mark, after = match(text, "^%s*([,}])()", (last or #text) + 1)
    if not mark then return nil end
    if mark == "}" then return after - 1 end
    position = match(text, "^%s*()", after)
  end
end

-- The same for the elements of the list at `first`.
local function each_element(text, first, visit)
  local position = match(text, "^%[%s*()", first)
  if not position then return nil end
  if sub(text, position, position) == "]" then return position end
  while true do
    local last = visit(position)
    local mark, after = match(text, "^%s*([,%]])()", (last or #text) + 1)
    if not mark then return nil end
    if mark == "]" then return after - 1 end
    position = match(text, "^%s*()", after)
  end
end

-- Kinds of values. A kind is given the text and where a value begins, and returns where it ends and
-- whether the fast front takes it.

local function scalar(takes)
  return function(text, first)
    local last = value_end(text, first)
    return last, last and takes(sub(text, first, last))
  end
end

local function one_of(...)
  local known = {}
  for _, value in ipairs({ ... }) do known[value] = true end
  return scalar(function(value) return known[value] end)
end

local function begins_with(...)
  local known = {}
  for _, start in ipairs({ ... }) do known[byte(start)] = true end
  return function(text, first)
    return value_end(text, first), known[byte(text, first)]
  end
end

local ANY = function(text, first) return value_end(text, first), true end
local NEVER = function(text, first) return value_end(text, first), false end
local FLAG = one_of("true", "false")
local FLAG_OR_NULL = one_of("true", "false", "null")
local TEXT = begins_with('"')
local TEXT_OR_NULL = begins_with('"', "n")
local LIST_OR_NULL = begins_with("[", "n")
local OBJECT_OR_NULL = begins_with("{", "n")
local INTEGER = scalar(function(value)
  -- Longer ones may not fit the fast front's types.
  return value == "null" or (#value <= 10 and match(value, "^%-?%d+$"))
end)
local SEED = scalar(function(value)
  return value == "null" or (#value <= 18 and match(value, "^%-?%d+$"))
end)
local NUMBER = scalar(function(value)
  return value == "null" or match(value, "^%-?%d[%d.eE+-]*$")
end)
local LOW_NUMBER = scalar(function(value)
  return value == "null" or (match(value, "^%d[%d.eE+-]*$") and tonumber(value) <= 2)
end)
local MEMBERS_OR_NULL = scalar(function(value)
  return value == "null" or (byte(value) == byte("{") and not match(value, "^{%s*}$"))
end)
local NUMBERS_BY_NAME = scalar(function(value)
  return value == "null" or (byte(value) == byte("{") and not find(value, ':%s*[^%s%d-]'))
end)

-- A list of whole numbers. They may be thousands, so each step looks at all that is left at once.
local function integers(text, first)
  local last = find(text, "]", first, true)
  if not last then return nil end
  local odd = find(text, "[", first + 1, true)
  if odd and odd < last then return container_end(text, first), false end
  for _, mark in ipairs({ '"', ".", "e", "-" }) do
    odd = find(text, mark, first, true)
    if odd and odd < last then return container_end(text, first), false end
  end
  return last, true
end

local function INTEGERS(text, first)
  if byte(text, first) ~= byte("[") then return value_end(text, first), false end
  return integers(text, first)
end
local function INTEGERS_OR_NULL(text, first)
  if byte(text, first) ~= byte("[") then return one_of("null")(text, first) end
  return integers(text, first)
end
local function SOME_INTEGERS_OR_NULL(text, first)
  if match(text, "^%[%s*%]", first) then return value_end(text, first), false end
  return INTEGERS_OR_NULL(text, first)
end
local function TEXT_OR_INTEGERS(text, first)
  if byte(text, first) == QUOTE then return string_end(text, first), true end
  return INTEGERS(text, first)
end

-- Messages of a chat.

local function object_of(kinds, otherwise)
  return function(text, first)
    local fast, seen = true, {}
    local last = each_member(text, first, function(key, value)
      local ends, takes = (kinds[key] or otherwise)(text, value)
      fast = fast and takes
      seen[key] = sub(text, value, value)
      return ends
    end)
    if not last then return value_end(text, first), false end
    return last, fast, seen
  end
end

local function list_of(kind, most)
  return function(text, first)
    local fast, count = true, 0
    local last = each_element(text, first, function(value)
      local ends, takes = kind(text, value)
      fast, count = fast and takes, count + 1
      return ends
    end)
    if not last then return value_end(text, first), false end
    return last, fast and count > 0 and count <= most
  end
end

-- Several parts of text are joined in another way than vLLM's server joins them.
local PARTS = list_of(object_of({ type = one_of('"text"'), text = TEXT }, NEVER), 1)
local ARGUMENTS = scalar(function(value) return match(value, '^"%s*{.*}%s*"$') end)
local CALLS = list_of(
  object_of({
    type = one_of('"function"'),
    ["function"] = object_of({ arguments = ARGUMENTS, name = TEXT }, ANY),
  }, ANY), 1e6)

local function CONTENT(text, first)
  if byte(text, first) ~= byte("[") then
    local last = value_end(text, first)
    return last, last and sub(text, first, last) ~= '""'
  end
  return PARTS(text, first)
end
local function CALLS_OR_NULL(text, first)
  if byte(text, first) ~= byte("[") then return one_of("null")(text, first) end
  return CALLS(text, first)
end

local MESSAGE_MEMBERS = object_of({
  role = one_of('"system"', '"user"', '"assistant"', '"tool"', '"developer"'),
  content = CONTENT, tool_calls = CALLS_OR_NULL, tool_call_id = TEXT,
  reasoning = TEXT_OR_NULL, reasoning_content = TEXT_OR_NULL,
  -- The fast front keeps these from the chat template.
  name = NEVER, task = NEVER, tools = NEVER,
}, ANY)

local function MESSAGE(text, first)
  local last, fast, seen = MESSAGE_MEMBERS(text, first)
  local says = seen and (seen.content == '"' or seen.content == "[" or seen.tool_calls == "[")
  return last, fast and says
end
local MESSAGES = list_of(MESSAGE, 1e6)

-- The fast front keeps tools that may not be chosen from the chat template.
local function TOOL_CHOICE(text, first)
  local last, fast, seen = object_of({ type = one_of('"function"') }, ANY)(text, first)
  if seen then return last, fast and seen.type end
  return one_of("null", '"auto"', '"required"')(text, first)
end

-- What the fast front passes on unread, and an engine refuses without a reason.
local function RESPONSE_FORMAT(text, first)
  local kinds = { type = one_of('"text"', '"json_object"', '"json_schema"') }
  local last, fast, seen = object_of(kinds, ANY)(text, first)
  if seen then return last, fast end
  return one_of("null")(text, first)
end
local function STRUCTURED_OUTPUTS(text, first)
  local kinds = { regex = NEVER, grammar = NEVER, structural_tag = NEVER }
  local last, fast, seen = object_of(kinds, ANY)(text, first)
  if seen then return last, fast end
  return one_of("null")(text, first)
end

local function merged(...)
  local all = {}
  for _, fields in ipairs({ ... }) do
    for name, kind in pairs(fields) do all[name] = kind end
  end
  return all
end

local SAMPLING = {
  model = TEXT_OR_NULL, user = ANY, request_id = TEXT, session_id = TEXT_OR_NULL,
  cache_salt = TEXT_OR_NULL, priority = one_of("0"),
  kv_transfer_params = one_of("null"), ec_transfer_params = one_of("null"),
  vllm_xargs = OBJECT_OR_NULL,
  n = one_of("1"), max_tokens = INTEGER, min_tokens = INTEGER, seed = SEED,
  temperature = NUMBER, top_p = NUMBER, top_k = INTEGER, min_p = NUMBER,
  presence_penalty = NUMBER, frequency_penalty = NUMBER,
  logit_bias = NUMBERS_BY_NAME, stop = ANY, stop_token_ids = INTEGERS_OR_NULL,
  allowed_token_ids = SOME_INTEGERS_OR_NULL, logprob_token_ids = INTEGERS_OR_NULL,
  include_stop_str_in_output = FLAG, ignore_eos = FLAG, skip_special_tokens = FLAG,
  spaces_between_special_tokens = one_of("true"), watermarking = FLAG,
  use_beam_search = one_of("false"), length_penalty = NEVER,
  truncate_prompt_tokens = one_of("null"), truncation_side = TEXT_OR_NULL,
  prompt_logprobs = INTEGER, add_special_tokens = FLAG, thinking_token_budget = INTEGER,
  repetition_detection = one_of("null"), response_format = RESPONSE_FORMAT,
  structured_outputs = STRUCTURED_OUTPUTS, stream = FLAG, stream_options = MEMBERS_OR_NULL,
  stream_interval = INTEGER, echo = FLAG, return_token_ids = FLAG_OR_NULL,
  return_tokens_as_token_ids = FLAG_OR_NULL, routed_experts_prompt_start = one_of("0"),
  -- Of no effect here; vLLM checks their types.
  return_token_offsets = NEVER, mm_payload = NEVER, return_mm_kwargs = NEVER,
}

-- Neither lets a client's template run unasked.
local RENDERING = {
  messages = MESSAGES, add_generation_prompt = FLAG_OR_NULL,
  continue_final_message = one_of("false"), chat_template = one_of("null"),
  chat_template_kwargs = OBJECT_OR_NULL, media_io_kwargs = one_of("null"),
  mm_processor_kwargs = one_of("null"), tools = LIST_OR_NULL,
}

local FIELDS = {
  ["/v1/completions"] = merged(SAMPLING, {
    prompt = TEXT_OR_INTEGERS, logprobs = INTEGER, repetition_penalty = NUMBER,
    suffix = one_of("null"), bad_words = one_of("[]"), prompt_embeds = one_of("null"),
  }),
  ["/v1/chat/completions"] = merged(SAMPLING, RENDERING, {
    logprobs = FLAG, top_logprobs = scalar(function(value) return match(value, "^[1-9]%d?$") end),
    max_completion_tokens = INTEGER, repetition_penalty = LOW_NUMBER, bad_words = LIST_OR_NULL,
    tool_choice = TOOL_CHOICE, reasoning_effort = TEXT_OR_NULL,
    include_reasoning = FLAG, parallel_tool_calls = FLAG_OR_NULL, documents = LIST_OR_NULL,
    return_prompt_text = one_of("null", "false"),
  }),
  ["/tokenize"] = merged(RENDERING, {
    model = TEXT_OR_NULL, prompt = TEXT, add_special_tokens = FLAG, return_token_strs = FLAG,
  }),
  ["/detokenize"] = { model = TEXT_OR_NULL, tokens = INTEGERS },
}

-- What only Baton may tell an engine. Each returns a sentence if the value is refused. The router
-- takes such fields out in any case: also of a body that is not seen whole.

local INTERNAL = "%s is not the client's to set; leave it out."

local function internal(text, first, last, name)
  if sub(text, first, last) ~= "null" then return INTERNAL:format(name) end
end

local function own_priority(text, first, last, name)
  local value = sub(text, first, last)
  if value ~= "null" and tonumber(value) ~= 0 then return INTERNAL:format(name) end
end

local function is_internal(argument)
  return argument == "kv_transfer_params" or argument == "ec_transfer_params"
    or argument == "kv_hints" or sub(argument, 1, 6) == "baton_"
end

local function extra_arguments(text, first)
  local message
  each_member(text, first, function(argument, value)
    if is_internal(argument) then message = INTERNAL:format(argument) end
    return value_end(text, value)
  end)
  return message
end

local REFUSED = {
  kv_transfer_params = internal, ec_transfer_params = internal, kv_hints = internal,
  data_parallel_rank = internal, vllm_xargs = extra_arguments, priority = own_priority,
}

local LENGTHS = { max_tokens = true, max_completion_tokens = true }

-- vLLM's server refuses it, the fast front makes it smaller.
local function too_long(text, first, last, name, context_tokens)
  local value = sub(text, first, last)
  local tokens = tonumber(value)
  if tokens and tokens > context_tokens then
    return ("`%s` is %s, but the context has %d tokens; ask for fewer."):format(
      name, value:sub(1, 20), context_tokens)
  end
end

-- "fast" or "full", and nil or why the body is refused. Of a body that is not complete, `text` is
-- the beginning; what comes after might ask for anything. What is no object no front can serve.
local function verdict(path, text, complete, context_tokens)
  local kinds = FIELDS[path]
  local fast, message, seen = kinds ~= nil, nil, {}
  local whole = each_member(text, match(text, "^%s*()"), function(key, value)
    local kind = kinds and kinds[key] or ANY
    local last, takes = kind(text, value)
    if not last then return nil end
    -- Of two values the fast front takes none, the full one the last.
    fast = fast and takes and not seen[key]
    seen[key] = true
    if REFUSED[key] then message = message or REFUSED[key](text, value, last, key) end
    if LENGTHS[key] then message = message or too_long(text, value, last, key, context_tokens) end
    return last
  end)
  if not whole then fast = complete and kinds ~= nil end
  return fast and "fast" or "full", message
end

return verdict
