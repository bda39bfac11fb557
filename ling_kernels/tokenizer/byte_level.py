"""The byte-level tokenizer, which needs no package: ids 0..255 are the bytes of UTF-8, then Ling's special tokens.

`byte_tokenizer_json` is an ordinary tokenizer.json, which `tokenizers` and AutoTokenizer load with the same ids.
"""

# <|startoftext|> to <|role_end|> in the order of Ling's vocabulary (ids 156891 .. 156895 there).
SPECIAL_TOKENS = (
    *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
TOKEN_BYTES = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL_TOKENS]  # by id

# Ling's chat format, as published with Ling-mini-2.0: the system turn is always present, shows the tools and sets the
# thinking mode, which is off there and a variable here; each turn ends with <|role_end|>; consecutive tool results
# share one turn; a thought, of reasoning_content or of a <think> block, is kept only after the last message that a user
# has written.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set text = message.content %}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
            {%- set last.user = loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- if tools %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with'
        ' function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within'
        ' <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}'
        '\\n</tool_call>\\n' }}
{%- endif %}
{{- 'detailed thinking ' + ('on' if enable_thinking else 'off') + '<|role_end|>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
    {%- elif message.role == 'system' %}
        {%- if not loop.first %}{{ '<role>SYSTEM</role>' + message.content + '<|role_end|>' }}{% endif %}
    {%- elif message.role == 'assistant' %}
        {%- set answer, calls = message.content, message.tool_calls or [] %}
        {%- if calls and (answer is undefined or answer is none) %}{% set answer = '' %}{% endif %}
        {%- set thought = message.reasoning_content %}
        {%- if thought is not string and '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<role>ASSISTANT</role>' }}
        {%- if thought and loop.index0 > last.user %}
            {{- '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- '' + answer }}
        {%- endif %}
        {%- for call in calls %}
            {%- set call = call.function or call %}
            {%- if answer or not loop.first %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|role_end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' %}{{ '<|role_end|>' }}{% endif %}
    {%- else %}
        {{- raise_exception('a role is system, user, assistant or tool, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""


def byte_settings() -> dict:
    """tokenizer_config.json of the byte-level tokenizer."""
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    flags = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return {**names, **flags, "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}


def byte_tokenizer_json() -> dict:
    """tokenizer.json of the byte-level tokenizer: byte-level BPE without merges."""
    # Byte-level BPE writes a byte as one visible character: itself if Latin-1 prints it, else the next from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    special = [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(SPECIAL_TOKENS)]
    steps = {"pre_tokenizer": level, "decoder": level, "model": {**model, "vocab": vocab, "merges": []}}
    return {"version": "1.0", **nothing, "added_tokens": special, **steps}
