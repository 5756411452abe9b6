"""Chat templates that behave like those of known model families, written for these tests, with tokenizers to match.

What matters of a family is here: what its turns end with, where its system prompt goes, what becomes of thoughts and
tool calls, and what its tokenizer does around special tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tests.support.tiny import CHATML


@dataclass(frozen=True)
class Family:
    """A template and its tokenizer."""

    template: str
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    """The last one ends texts."""
    added: tuple[str, ...] = ()
    """Tokens that are not special."""
    kind: Literal["bytes", "prepend", "metaspace"] = "bytes"
    """`prepend` writes a space before each text between special tokens, as the first Llamas' files say."""
    strips: bool = False
    """Whether special tokens swallow the white space behind them."""
    thoughts: Literal["as written", "last", "dropped"] = "as written"
    """What becomes of `<think>…</think>` in an answer: written as it is, in the last turn only, or never."""
    reasoning: bool = False
    """Whether `reasoning_content` is written."""
    tools: bool = False
    """Whether functions, calls and results are written."""
    system: Literal["anywhere", "first", "in user"] = "anywhere"
    """Where system messages may stand; `in user`: nowhere, the first user turn has to take it."""


QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "IMPLICIT"
    "{%- endif %}"
)
QWEN_CALLS = (
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function %}"
    "{{- '\n<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}\n</tool_call>' }}"
    "{%- endfor %}"
)
QWEN_RESULT = (
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
)
QWEN_OTHER = (
    "{%- elif m.role == 'user' or not loop.first %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN25 = (
    QWEN_TOOLS.replace("IMPLICIT", "{%- else %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}")
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' + m.content }}"
    + QWEN_CALLS
    + "{{- '<|im_end|>\n' }}"
    + QWEN_RESULT
    + QWEN_OTHER
)
QWEN3 = (
    QWEN_TOOLS.replace("IMPLICIT", "") + "{%- set ns = namespace(asked=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set text = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{%- else %}{{- text }}{%- endif %}" + QWEN_CALLS + "{{- '<|im_end|>\n' }}" + QWEN_RESULT + QWEN_OTHER
)
QWQ = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
LLAMA2 = (
    "{%- if messages[0].role == 'system' %}{%- set rest = messages[1:] %}{%- set sys = messages[0].content %}"
    "{%- else %}{%- set rest = messages %}{%- set sys = false %}{%- endif %}"
    "{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{%- if loop.index0 == 0 and sys %}{%- set text = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content %}"
    "{%- else %}{%- set text = m.content %}{%- endif %}"
    "{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{%- else %}{{- ' ' + text.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA31 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set sys = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: 2023\n\n' + sys + '<|eot_id|>' }}"
    "{%- if tools %}{%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a call of one of:\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}"
    "{{- first + '<|eot_id|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('One call at a time') }}{%- endif %}"
    "{%- set f = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}{%- else %}{{- m.content }}"
    "{%- endif %}{{- '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA4 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|header_start|>' + m.role + '<|header_end|>\n\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content %}{{- c.text }}{%- endfor %}"
    "{%- endif %}{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)
GEMMA2 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}"
    "{%- endif %}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{- '<end_of_turn>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
GEMMA3 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set first = '' %}{%- set rest = messages %}{%- endif %}"
    "{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
MISTRAL1 = (
    "{{- bos_token }}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL3 = (
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if loop.last and sys is defined %}{{- '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
MISTRAL_SMALL = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for call in m.tool_calls %}"
    "{{- '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]{\"content\": ' + m.content | string + '}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- m.content + eos_token }}{%- endif %}"
    "{%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- endfor %}"
)
PHI3 = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
PHI4 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"
)
DEEPSEEK3 = (
    "{%- set ns = namespace(sys='') %}{%- for m in messages %}{%- if m.role == 'system' %}"
    "{%- set ns.sys = ns.sys + m.content %}{%- endif %}{%- endfor %}{{- bos_token + ns.sys }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' and m.tool_calls %}{{- '<|Assistant|>' + m.content + '<|calls|>' }}"
    "{%- for call in m.tool_calls %}{{- call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}"
    "{%- endfor %}{{- eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '<|output|>' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}"
)
R1 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}"
)
HARMONY = (
    "{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}"
    "{%- if messages[0].role == 'system' or tools %}{{- '<|start|>developer<|message|>' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{%- for tool in tools or [] %}{{- '\n// ' + (tool.function.description or '') }}"
    "{{- '\ntype ' + tool.function.name + ' = ' + tool.function.parameters | tojson }}{%- endfor %}"
    "{{- '<|end|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}"
    "{%- if m.content or m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' }}"
    "{{- (m.content or m.thinking) + '<|end|>' }}{%- endif %}{%- set f = m.tool_calls[0].function %}"
    "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{- f.arguments | tojson + '<|call|>' }}"
    "{%- elif m.role == 'assistant' and loop.last %}"
    "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' }}"
    "{{- m.content | tojson + '<|end|>' }}"
    "{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
GLM4 = (
    "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\nTools:' }}{%- for tool in tools %}"
    "{{- '\n## ' + tool.function.name + '\n' + tool.function | tojson }}{%- endfor %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}"
    "{%- for call in m.tool_calls %}{%- set f = call.function %}"
    "{{- '<|assistant|>' + f.name + '\n' + f.arguments | tojson }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
GLM45 = (
    "{{- '[gMASK]<sop>' }}{%- set ns = namespace(asked=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>' }}"
    "{%- set text = m.content %}{%- set thought = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thought = m.reasoning_content %}{%- elif '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set text = text.split('</think>')[-1] %}{%- endif %}"
    "{{- '\n<think>' + (thought.strip() if loop.index0 > ns.asked else '') + '</think>' }}"
    "{%- if text.strip() %}{{- '\n' + text.strip() }}{%- endif %}{{- '<|endoftext|>' }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
SMOLLM3 = (
    "{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Instructions\n\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content.rstrip() }}{%- else %}{{- 'Be smart.' }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- generation %}{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') }}"
    "{{- '<|im_end|>\n' }}{%- endgeneration %}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ZEPHYR = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|user|>\n' + m.content + eos_token + '\n' }}"
    "{%- elif m.role == 'system' %}{{- '<|system|>\n' + m.content + eos_token + '\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|assistant|>\n' + m.content + eos_token + '\n' }}{%- endif %}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}{%- endfor %}"
)
COMMAND_R = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|>' }}"
    "{%- if m.role == 'user' %}{{- '<|USER_TOKEN|>' + m.content.strip() }}"
    "{%- elif m.role == 'system' %}{{- '<|SYSTEM_TOKEN|>' + m.content.strip() }}"
    "{%- elif m.role == 'assistant' %}{{- '<|CHATBOT_TOKEN|>' + m.content.strip() }}"
    "{%- else %}{{- raise_exception('Unknown role') }}{%- endif %}{{- '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)
GRANITE = (
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set sys = 'You are an assistant.' %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + sys + '<|end_of_text|>\n' }}"
    "{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}"
    "{%- endif %}{%- for m in rest %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    "{%- if m.tool_calls %}{{- '<|tool_call|>' + m.tool_calls | tojson }}{%- endif %}{{- '<|end_of_text|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
OLMO2 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|assistant|>\n' + m.content + eos_token }}{%- if not loop.last %}{{- '\n' }}{%- endif %}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}{%- endif %}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}{%- endfor %}"
)
FALCON = (
    "{%- for m in messages %}{%- if not loop.first %}{{- '\n' }}{%- endif %}"
    "{{- {'user': 'User: ', 'assistant': 'Falcon: ', 'system': ''}[m.role] }}"
    "{{- m.content.strip().replace('\r\n', '\n').replace('\n\n', '\n') }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\nFalcon:' }}{%- endif %}"
)
FALCON3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>\n' + m.content + eos_token }}"
    "{%- if not loop.last %}{{- '\n' }}{%- endif %}{%- else %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}"
    "{%- endif %}{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}{%- endfor %}"
)
NEMOTRON = (
    "{{- '<extra_id_0>System' }}{%- for m in messages %}{%- if m.role == 'system' %}{{- '\n' + m.content.strip() }}"
    "{%- endif %}{%- endfor %}{{- '\n' }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '\n<extra_id_1>User\n' + m.content.strip() + '\n<extra_id_1>Assistant\n' }}"
    "{%- elif m.role == 'assistant' %}{{- m.content.strip() + '<eos>' }}{%- endif %}{%- endfor %}"
)
VICUNA = (
    "{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content + ' ' }}"
    "{%- elif m.role == 'user' %}{{- 'USER: ' + m.content.strip() + ' ' }}"
    "{%- elif m.role == 'assistant' %}{{- 'ASSISTANT: ' + m.content.strip() + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
ALPACA = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '### Instruction:\n' + m.content + '\n\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{%- else %}{{- m.content + '\n\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}"
)
EXAONE = (
    "{%- for m in messages %}{%- if loop.first and m.role != 'system' %}{{- '[|system|][|endofturn|]\n' }}{%- endif %}"
    "{{- '[|' + m.role + '|]' + m.content }}"
    "{%- if m.role == 'user' %}{{- '\n' }}{%- else %}{{- '[|endofturn|]\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"
)
MINICPM = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<user>' + m.content.strip() + '<AI>' }}"
    "{%- else %}{{- m.content.strip() + ('' if m.role == 'system' else eos_token) }}{%- endif %}{%- endfor %}"
)
THOUGHT = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<bos>", "<start_of_turn>", "<end_of_turn>")
OLD = ("<s>", "</s>")

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML),
    "yi": Family(CHATML, kind="metaspace"),
    "internlm": Family("{{- bos_token }}" + CHATML, ("<s>", "<|im_start|>", "<|im_end|>"), kind="metaspace"),
    "qwen 2.5": Family(QWEN25, added=CALL, tools=True),
    "qwen 3": Family(QWEN3, added=THOUGHT + CALL, thoughts="last", reasoning=True, tools=True),
    "qwen 3 with special thoughts": Family(
        QWEN3, (*THOUGHT, "<|im_start|>", "<|im_end|>"), CALL, thoughts="last", reasoning=True, tools=True
    ),
    "qwq": Family(QWQ, added=THOUGHT),
    "llama 2": Family(LLAMA2, OLD, kind="prepend", system="first"),
    "llama 2, new file": Family(LLAMA2, OLD, kind="metaspace", system="first"),
    "llama 3": Family(LLAMA3, HEADERS),
    "llama 3.1": Family(LLAMA31, HEADERS, tools=True),
    "llama 4": Family(LLAMA4, ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")),
    "gemma 2": Family(GEMMA2, TURNS, system="in user"),
    "gemma 3": Family(GEMMA3, TURNS, kind="metaspace", system="first"),
    "mistral 0.1": Family(MISTRAL1, OLD, kind="prepend", system="in user"),
    "mistral 0.3": Family(MISTRAL3, ("<s>", "[INST]", "[/INST]", "</s>"), kind="prepend", system="in user"),
    "mistral small": Family(
        MISTRAL_SMALL,
        ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "</s>"),
        tools=True,
    ),
    "phi 3": Family(PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), strips=True),
    "phi 4": Family(PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "deepseek v3": Family(
        DEEPSEEK3, ("<bos>", "<|User|>", "<|Assistant|>", "<|calls|>", "<|output|>", "<eos>"), system="first"
    ),
    "deepseek r1": Family(R1, ("<bos>", "<|User|>", "<|Assistant|>", "<eos>"), THOUGHT, thoughts="dropped"),
    "gpt-oss": Family(
        HARMONY,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        reasoning=True,
        tools=True,
        system="first",
    ),
    "glm 4": Family(
        GLM4,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        tools=True,
    ),
    "glm 4.5": Family(
        GLM45,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
        THOUGHT,
        thoughts="last",
        reasoning=True,
    ),
    "smollm 2": Family(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "smollm 3": Family(SMOLLM3, added=THOUGHT, system="first"),
    "zephyr": Family(ZEPHYR, ("<|user|>", "<|system|>", "<|assistant|>", "</s>"), kind="metaspace"),
    "command-r": Family(
        COMMAND_R,
        ("<bos>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|END_OF_TURN_TOKEN|>"),
    ),
    "granite": Family(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"), tools=True
    ),
    "olmo 2": Family(OLMO2, ("<|endoftext|>",)),
    "tulu": Family(OLMO2, ("<s>", "</s>"), kind="prepend"),
    "falcon": Family(FALCON, ("<|endoftext|>",)),
    "falcon 3": Family(FALCON3, ("<|endoftext|>",), ("<|system|>", "<|user|>", "<|assistant|>")),
    "nemotron": Family(NEMOTRON, ("<extra_id_0>", "<extra_id_1>", "<eos>"), system="first"),
    "vicuna": Family(VICUNA, OLD, kind="prepend"),
    "alpaca": Family(ALPACA, OLD, kind="metaspace"),
    "exaone": Family(EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")),
    "minicpm": Family(MINICPM, ("<s>", "<user>", "<AI>", "</s>"), kind="metaspace"),
}  # fmt: skip

WORDS = (
    "The weather in town is fine today, and the answer is here: Hello world. What is in the user's question?\n\n"
    "assistant\nuser\nsystem\n  def f(x):\n    return x  # yes\n\n1. One\n2. Two\n\nASSISTANT: yes. USER: no. Falcon: "
    "### Response:\n### Instruction:\n"
)


@cache
def tokenizer_of(name: str) -> Any:
    """A small tokenizer with merges, the family's tokens and its template. Shared: never change it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    if family.kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        alphabet = ["▁"]
        if family.kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    bytes_of = [f"<0x{i:02X}>" for i in range(256)] if family.kind != "bytes" else []
    special = list(dict.fromkeys(["<unk>", *bytes_of, *family.special]))
    trainer = trainers.BpeTrainer(
        vocab_size=420 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    if bytes_of:  # they were special to the trainer only
        import json

        described = json.loads(backend.to_str())
        described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in bytes_of]
        backend = Tokenizer.from_str(json.dumps(described))
    backend.add_special_tokens([AddedToken(t, rstrip=family.strips, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in family.added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.special[0], eos_token=family.special[-1], unk_token="<unk>"
    )
    fast.chat_template = family.template
    return fast
