from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOT_FINISHED: _ClassVar[Finish]
    STOP: _ClassVar[Finish]
    LENGTH: _ClassVar[Finish]
    ABORTED: _ClassVar[Finish]
    ERROR: _ClassVar[Finish]
    REPETITION: _ClassVar[Finish]
    REFUSED: _ClassVar[Finish]
NOT_FINISHED: Finish
STOP: Finish
LENGTH: Finish
ABORTED: Finish
ERROR: Finish
REPETITION: Finish
REFUSED: Finish

class RouterMessage(_message.Message):
    __slots__ = ("hello", "commands")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    commands: _containers.RepeatedCompositeFieldContainer[Command]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., commands: _Optional[_Iterable[_Union[Command, _Mapping]]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("submit", "abort", "resend", "forget", "ask_cache", "reserve", "queued", "learned")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ASK_CACHE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    resend: Resend
    forget: Forget
    ask_cache: AskCache
    reserve: Reserve
    queued: Queued
    learned: Learned
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., resend: _Optional[_Union[Resend, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ..., ask_cache: _Optional[_Union[AskCache, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., learned: _Optional[_Union[Learned, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "router_incarnation")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_incarnation: int
    def __init__(self, router_id: _Optional[str] = ..., router_incarnation: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_key", "attempt", "engine_tag", "engine_request", "output_token_ids", "manifest", "hand_off", "to_compute_tokens")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_TAG_FIELD_NUMBER: _ClassVar[int]
    ENGINE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    TO_COMPUTE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    attempt: int
    engine_tag: str
    engine_request: bytes
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    manifest: bytes
    hand_off: bool
    to_compute_tokens: int
    def __init__(self, request_key: _Optional[str] = ..., attempt: _Optional[int] = ..., engine_tag: _Optional[str] = ..., engine_request: _Optional[bytes] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., manifest: _Optional[bytes] = ..., hand_off: _Optional[bool] = ..., to_compute_tokens: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_key", "attempt")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    attempt: int
    def __init__(self, request_key: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Resend(_message.Message):
    __slots__ = ("request_key", "attempt", "from_position")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FROM_POSITION_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    attempt: int
    from_position: int
    def __init__(self, request_key: _Optional[str] = ..., attempt: _Optional[int] = ..., from_position: _Optional[int] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("request_key", "attempt")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    attempt: int
    def __init__(self, request_key: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class AskCache(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("request_key", "context_tokens")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    context_tokens: int
    def __init__(self, request_key: _Optional[str] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("requests", "work_s", "first_due_in_s")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WORK_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_DUE_IN_S_FIELD_NUMBER: _ClassVar[int]
    requests: int
    work_s: float
    first_due_in_s: float
    def __init__(self, requests: _Optional[int] = ..., work_s: _Optional[float] = ..., first_due_in_s: _Optional[float] = ...) -> None: ...

class Learned(_message.Message):
    __slots__ = ("router_id", "ttft", "tpot", "age_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    ttft: LearnedMargin
    tpot: LearnedMargin
    age_s: float
    def __init__(self, router_id: _Optional[str] = ..., ttft: _Optional[_Union[LearnedMargin, _Mapping]] = ..., tpot: _Optional[_Union[LearnedMargin, _Mapping]] = ..., age_s: _Optional[float] = ...) -> None: ...

class LearnedMargin(_message.Message):
    __slots__ = ("seen", "log_mean", "log_variance", "judged", "caution_spreads")
    SEEN_FIELD_NUMBER: _ClassVar[int]
    LOG_MEAN_FIELD_NUMBER: _ClassVar[int]
    LOG_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    JUDGED_FIELD_NUMBER: _ClassVar[int]
    CAUTION_SPREADS_FIELD_NUMBER: _ClassVar[int]
    seen: float
    log_mean: float
    log_variance: float
    judged: float
    caution_spreads: float
    def __init__(self, seen: _Optional[float] = ..., log_mean: _Optional[float] = ..., log_variance: _Optional[float] = ..., judged: _Optional[float] = ..., caution_spreads: _Optional[float] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "step", "metrics", "cache_snapshot", "learned")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: Step
    metrics: Metrics
    cache_snapshot: CacheSnapshot
    learned: Learned
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ..., cache_snapshot: _Optional[_Union[CacheSnapshot, _Mapping]] = ..., learned: _Optional[_Union[Learned, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker_id", "worker_incarnation", "role", "engine_tag", "block_size_tokens", "kv_blocks_total", "max_model_len_tokens", "ready_payload", "held", "index_block_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_TAG_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READY_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    INDEX_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_incarnation: int
    role: str
    engine_tag: str
    block_size_tokens: int
    kv_blocks_total: int
    max_model_len_tokens: int
    ready_payload: bytes
    held: _containers.RepeatedCompositeFieldContainer[Held]
    index_block_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., worker_incarnation: _Optional[int] = ..., role: _Optional[str] = ..., engine_tag: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., max_model_len_tokens: _Optional[int] = ..., ready_payload: _Optional[bytes] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., index_block_tokens: _Optional[int] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("request_key", "attempt", "first_position", "next_position", "ended", "aborted")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    attempt: int
    first_position: int
    next_position: int
    ended: bool
    aborted: bool
    def __init__(self, request_key: _Optional[str] = ..., attempt: _Optional[int] = ..., first_position: _Optional[int] = ..., next_position: _Optional[int] = ..., ended: _Optional[bool] = ..., aborted: _Optional[bool] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("request_keys", "attempts", "first_positions", "token_counts", "token_ids", "payloads", "details", "load", "cache_change")
    REQUEST_KEYS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CACHE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    request_keys: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    first_positions: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    payloads: _containers.RepeatedScalarFieldContainer[bytes]
    details: _containers.RepeatedCompositeFieldContainer[Detail]
    load: Load
    cache_change: CacheChange
    def __init__(self, request_keys: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., first_positions: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., payloads: _Optional[_Iterable[bytes]] = ..., details: _Optional[_Iterable[_Union[Detail, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., cache_change: _Optional[_Union[CacheChange, _Mapping]] = ...) -> None: ...

class CacheSnapshot(_message.Message):
    __slots__ = ("number", "held", "more")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    number: int
    held: bytes
    more: bool
    def __init__(self, number: _Optional[int] = ..., held: _Optional[bytes] = ..., more: _Optional[bool] = ...) -> None: ...

class CacheChange(_message.Message):
    __slots__ = ("number", "merged", "removed", "stored")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    number: int
    merged: int
    removed: bytes
    stored: bytes
    def __init__(self, number: _Optional[int] = ..., merged: _Optional[int] = ..., removed: _Optional[bytes] = ..., stored: _Optional[bytes] = ...) -> None: ...

class Detail(_message.Message):
    __slots__ = ("output", "finish", "manifest", "error", "prompt_use")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_USE_FIELD_NUMBER: _ClassVar[int]
    output: int
    finish: Finish
    manifest: bytes
    error: str
    prompt_use: PromptUse
    def __init__(self, output: _Optional[int] = ..., finish: _Optional[_Union[Finish, str]] = ..., manifest: _Optional[bytes] = ..., error: _Optional[str] = ..., prompt_use: _Optional[_Union[PromptUse, _Mapping]] = ...) -> None: ...

class PromptUse(_message.Message):
    __slots__ = ("prompt_tokens", "computed_tokens", "cached_tokens", "transferred_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    transferred_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., transferred_tokens: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "kv_blocks_used", "kv_blocks_total", "step_time_s", "others", "queued_beside")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_S_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BESIDE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    step_time_s: float
    others: PlacedWork
    queued_beside: Queued
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., step_time_s: _Optional[float] = ..., others: _Optional[_Union[PlacedWork, _Mapping]] = ..., queued_beside: _Optional[_Union[Queued, _Mapping]] = ...) -> None: ...

class PlacedWork(_message.Message):
    __slots__ = ("prompts", "prompt_tokens", "prompt_pairs", "computed_tokens", "computed_pairs", "decodes", "context_tokens", "running", "running_context_tokens", "coming_tokens", "routers")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PAIRS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    prompts: int
    prompt_tokens: int
    prompt_pairs: int
    computed_tokens: int
    computed_pairs: int
    decodes: int
    context_tokens: int
    running: int
    running_context_tokens: int
    coming_tokens: int
    routers: int
    def __init__(self, prompts: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_pairs: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., computed_pairs: _Optional[int] = ..., decodes: _Optional[int] = ..., context_tokens: _Optional[int] = ..., running: _Optional[int] = ..., running_context_tokens: _Optional[int] = ..., coming_tokens: _Optional[int] = ..., routers: _Optional[int] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...
