"""`task=dialog`: the replies of one speaker, given the persona and the turns before each reply.

One dialog is one example: its loss is the mean over the target tokens of all of its replies, also if it needs several
rows of the batch. A private run therefore protects whole dialogs. The scores on held-out dialogs are the perplexity of
the replies, and the word F1 of generated replies against those of the person (Zhang et al. 2018, section 5).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError, option, register
from memsave.config.schema import TrainerConfig
from memsave.data.errors import DataError
from memsave.data.fingerprint import fingerprint_of
from memsave.data.text.dialogs import DialogData, parse_messages
from memsave.data.text.encode_dialogs import encode_context, encode_dialogs, format_of
from memsave.data.text.messages import Dialog, Message
from memsave.data.text.splits import raw_data
from memsave.data.text.tables import Row
from memsave.data.text.word_f1 import word_f1
from memsave.progress import Progress
from memsave.tasks.definition import option_of
from memsave.tasks.language.decoding import write_texts, write_texts_together
from memsave.tasks.language.definition import LanguageDefinition, LanguageTaskConfig
from memsave.tasks.language.pretrained import Purpose
from memsave.tasks.language.task import LanguageTask, dummy_batch, text_losses
from memsave.training.loop import autocast, evaluating
from memsave.training.task import Batch, Task

SAMPLES = 8  # replies in samples.md


@register("task", "dialog")
@dataclass
class DialogConfig(LanguageTaskConfig):
    """Replies in dialogs, such as those of Persona-Chat or of chats with an assistant."""

    kind: str = "dialog"
    template: str = option("auto", choices=("auto", "plain"))
    """auto writes dialogs by the tokenizer's chat template, if it has one; plain never uses it."""
    generate: int = option(64, least=1)
    """Number of held-out dialogs in which one reply is generated, for word F1 and samples.md."""
    new_tokens: int = option(40, least=1)
    """Longest generated reply in tokens; the context gets the other tokens of data.max_length."""
    beams: int = option(1, least=1)
    """Width of the beam search; 1 takes the most probable token."""

    def definition(self, config: Config) -> "DialogDefinition":
        """The definition for a whole config."""
        return DialogDefinition(config)

    def answerer(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device) -> "DialogAnswerer":
        """What memsave.generate asks."""
        return DialogAnswerer(model, tokenizer, form=form, device=device)


class DialogDefinition(LanguageDefinition):
    """Dialogs; see `DialogTask`."""

    data_class = DialogData

    @property
    def data(self) -> DialogData:
        """The config of the data."""
        return cast(DialogData, self.config.data)

    @property
    def task(self) -> DialogConfig:
        """The config of the task."""
        return cast(DialogConfig, self.config.task)

    def validate(self) -> None:
        """Raise ConfigError for combinations that cannot run."""
        super().validate()
        if self.task.new_tokens >= self.data.max_length:
            raise ConfigError(
                f"task.new_tokens is {self.task.new_tokens}, which leaves no token of data.max_length="
                f"{self.data.max_length} for the context; give a smaller task.new_tokens"
            )

    def purpose(self) -> Purpose:
        """Writing replies. Raises ConfigError for an encoder-decoder."""
        found = super().purpose()
        if found.kind == "encoder_decoder":
            raise ConfigError(
                f"model={option_of('model', self.model)} ({self.model.name}) is an encoder-decoder, which task=dialog "
                f"does not train; give a causal model such as model=gpt2"
            )
        return found

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its dialogs."""
        train, held_out = self.data.splits()
        options: dict[str, Any] = {"trainer": self.config.trainer, "head": self.model.head}
        return DialogTask(train, held_out, tokenizer, data=self.data, task=self.task, device=device, **options)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the mean cross-entropy over the target tokens of each dialog."""
        return text_losses(model, batch, head=self.model.head)

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """Dialogs with the largest number of full rows in which every token is a target."""
        rows = self.data.max_rows
        if rows is None:
            raise ConfigError("data.max_rows is null, so the size of a batch is unknown; give data.max_rows=2")
        return dummy_batch(count=count, rows=rows, length=self.data.max_length, device=device)

    def fixed_sizes(self) -> list[str]:
        """Tokens and rows of an example."""
        rows = self.data.max_rows or 1
        return [*super().fixed_sizes(), *([f"{rows} rows"] if rows > 1 else [])]


@dataclass(frozen=True)
class Evaluation:
    """The generated replies of one evaluation, in the order of `DialogTask.chosen`, and its scores."""

    texts: list[str]
    scores: dict[str, float]


class DialogTask(LanguageTask):
    """Training dialogs and held-out dialogs; implements `memsave.training.task.Task`."""

    unit = "one dialog with all of its turns"

    def __init__(
        self,
        train: Sequence[Dialog],
        held_out: Sequence[Dialog],
        tokenizer: Any,
        *,
        data: DialogData,
        task: DialogConfig | None = None,
        trainer: TrainerConfig,
        device: torch.device,
        head: str = "chunked",
    ):
        self.data, self.task = data, task or DialogConfig()
        raw = raw_data(train, held_out)
        self.held_out, self.data_fingerprint = list(held_out), fingerprint_of(each.messages for each in raw)
        self.record_units = [each.unit for each in train]
        self.form = format_of(tokenizer, template=self.task.template)
        lengths: dict[str, Any] = {"max_length": data.max_length, "max_rows": data.max_rows}
        examples, self.encoded = encode_dialogs(train, self.form, **lengths)
        scored, self.held_out_encoded = encode_dialogs(self.held_out[: self.task.evaluate], self.form, **lengths)
        super().__init__(examples, scored, tokenizer, precision=trainer.precision, device=device, head=head)
        self.chosen = [_one_reply(each, i) for i, each in enumerate(self.held_out[: self.task.generate])]
        self.evaluations: list[Evaluation] = []

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of dialogs, replies, target tokens and cuts, for training dialogs and scored held-out dialogs."""
        held_out = {"dialogs": len(self.held_out), "written_replies": len(self.chosen)}
        return {**asdict(self.encoded), "held_out": {**held_out, **asdict(self.held_out_encoded)}}

    def describe_counts(self) -> str:
        """The counts in one line."""
        lengths: dict[str, Any] = {"max_length": self.data.max_length, "max_rows": self.data.max_rows}
        return (
            f"training dialogs: {self.size}, {self.encoded.describe(**lengths)}; held-out dialogs: "
            f"{len(self.held_out)}, of which {self.held_out_encoded.examples} are scored (task.evaluate), "
            f"{self.held_out_encoded.describe(**lengths)}; {len(self.chosen)} get a generated reply (task.generate)"
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity per target token of the held-out replies, and word F1 (0 to 1) of generated replies."""
        texts = self.write(model, [context for context, _ in self.chosen])
        references = [reply for _, reply in self.chosen]
        scores = {"perplexity": self.perplexity(model), "word_f1": word_f1(zip(texts, references, strict=True))}
        self.evaluations.append(Evaluation(texts, scores))
        return scores

    def write(self, model: Any, contexts: Sequence[Sequence[Message]]) -> list[str]:
        """Generate the reply to each list of messages."""
        tokens = [encode_context(each, self.form, limit=self.context_tokens) for each in contexts]
        options: dict[str, Any] = {"new_tokens": self.task.new_tokens, "beams": self.task.beams, "ends": self.form.ends}
        with evaluating(model), autocast(model, self.precision):
            return write_texts_together(model, self.tokenizer, tokens, **options, device=self.device)

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest context of a generated reply."""
        return max(1, self.data.max_length - self.task.new_tokens)

    def show(self, folder: Path) -> list[Path]:
        """Write `samples.md`: contexts with the replies of the model, before and after training, and of the person."""
        path = folder / "samples.md"
        first, last = self.evaluations[0], self.evaluations[-1]
        lines = ["# Generated replies in held-out dialogs", ""]
        for number, (context, reply) in enumerate(self.chosen[:SAMPLES]):
            lines += [f"## Dialog {number + 1}", ""]
            for role, content in context:
                lines += [f"> **{role}:** {_one_line(content)}", ">"]
            lines[-1] = ""
            if first is not last:
                lines.append(f"- before: {_one_line(first.texts[number])}")
            lines += [f"- after: {_one_line(last.texts[number])}", f"- person: {_one_line(reply)}", ""]
        path.write_text("\n".join(lines), encoding="utf-8")
        return [path]

    def prompt_format(self) -> dict[str, Any]:
        """The content of `prompt.json`.

        `encode_context` of `memsave.data.text.encode_dialogs` turns messages into the tokens of a prompt. In the plain
        format these are each message in the form of its role, in which {content} is the text, and then `reply_start`.
        """
        return {
            "task": "dialog",
            "format": self.form.name,
            "template": self.task.template,
            **self.form.describe(),
            "add_special_tokens": False,
            "max_prompt_tokens": self.context_tokens,
            "generate": {
                "max_new_tokens": self.task.new_tokens,
                "num_beams": self.task.beams,
                "do_sample": False,
                "eos_token_id": self.form.ends,
                "pad_token_id": self.tokenizer.pad_token_id,
            },
        }

    def summary(self, scores: dict[str, float]) -> str:
        """The scores in one line, with those before training if there are any."""
        first = self.evaluations[0].scores
        each = (
            f"{name} {scores[key]:.2f}" + (f" (before: {first[key]:.2f})" if first is not scores else "")
            for key, name in {"perplexity": "perplexity of the replies", "word_f1": "word F1"}.items()
        )
        return f"On held-out dialogs: {', '.join(each)}"


class DialogAnswerer:
    """Replies to messages, or to a message of the user, before which there may be a persona."""

    column = "message"
    gives = ("reply",)

    def __init__(self, model: Any, tokenizer: Any, *, form: dict[str, Any], device: torch.device):
        self.model, self.tokenizer, self.written, self.device = model, tokenizer, form, device
        self.form = format_of(tokenizer, template=form["template"])
        self.digest = ""

    def read(self, row: Row) -> list[int]:
        """The tokens before the reply to the messages of a row, which the assistant must not have written last."""
        if "messages" in row.values:
            messages = parse_messages(row, with_reply=False)
        else:
            persona = row.text("persona") if "persona" in row.values else ""
            system = (Message("system", persona),) if persona else ()
            messages = (*system, Message("user", row.text(self.column)))
        if not messages or not messages[-1].content:
            raise DataError(f"{row.where} has no message: add one or delete the line.")
        if messages[-1].role == "assistant":
            raise DataError(f"{row.where} ends with a message of the assistant: delete that message.")
        return encode_context(messages, self.form, limit=self.written["max_prompt_tokens"], where=row.where)

    def answer(self, inputs: Sequence[list[int]]) -> list[dict[str, Any]]:
        """The replies, generated as in the evaluations of training."""
        asked = self.written["generate"]
        options: dict[str, Any] = {"new_tokens": asked["max_new_tokens"], "beams": asked["num_beams"]}
        options |= {"ends": asked["eos_token_id"], "batch_size": len(inputs), "device": self.device}
        texts = write_texts(self.model, self.tokenizer, inputs, **options)
        with torch.inference_mode():
            return [{"reply": text} for text in texts]


def _one_reply(dialog: Dialog, number: int) -> tuple[list[Message], str]:
    """(the messages before a reply, the reply): the first one of dialog 0, the second one of dialog 1, and so on."""
    replies = [i for i, message in enumerate(dialog.messages) if message.role == "assistant"]
    position = replies[number % len(replies)]
    return list(dialog.messages[:position]), dialog.messages[position].content


def _one_line(text: str) -> str:
    return " / ".join(text.split("\n"))
