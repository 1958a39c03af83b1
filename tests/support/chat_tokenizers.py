"""Small tokenizers with and without a chat template."""

from memsave.data.text.calls import public_dialogs
from memsave.tasks.language.small_gpt2 import train_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def plain_tokenizer(size=400):
    dialogs = public_dialogs(100)
    return train_tokenizer([f"{role}: {content}" for each in dialogs for role, content in each.messages], size=size)


def chat_tokenizer(template=CHATML, **options):
    tokenizer = plain_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer
