"""The prompts of other trainers' files: their text and the tokens they train."""

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_trainer.config.compatibility import SHIPPED
from lora_trainer.config.named_templates import text_of
from lora_trainer.data.formats import to_example
from lora_trainer.data.mask import encode
from support.byte_tokenizer import make_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "3\nlines"},
]
# What LLaMA-Factory 0.9.5 makes of this conversation; chatml and llama3 are Axolotl 0.19's too.
WRITTEN = {
    "chatml": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n"
    "<|im_start|>assistant\n3\nlines<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n3\nlines<|eot_id|>",
    "mistral": "<s>[INST] Be kind\n\nHi[/INST] Hello</s>[INST] 2?[/INST] 3\nlines</s>",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_that_ships_is_that_of_the_other_trainer(name):
    program = _compile_jinja_template(text_of(name))
    written = program.render(messages=CHAT, bos_token="<s>", eos_token="</s>")
    assert written == WRITTEN[name]


@pytest.mark.parametrize("extra", ["", "1 2"])
def test_axolotls_alpaca_trains_the_answer_and_its_end_alone(extra):
    tokenizer = make_tokenizer()
    row = {"instruction": "Add", "input": extra, "output": "It is 3"}
    encoded = encode(to_example(row, "alpaca_text"), tokenizer, None, "assistant")
    trained = [
        one for one, is_trained in zip(encoded.input_ids, encoded.loss_mask, strict=True)
        if is_trained
    ]  # fmt: skip
    assert tokenizer.decode(trained) == "It is 3</s>"
    assert encoded.loss_mask[-len(trained) :] == [True] * len(trained)
