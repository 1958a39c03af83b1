"""Persona-Chat files and chat files: what is read, and one sentence for each fault."""

import json
from pathlib import Path

import pytest

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.errors import collecting_faults
from memsave.data.text.dialogs import ChatData, PersonaChatData, read_chat, read_personachat
from memsave.data.text.messages import Dialog, Message

REAL = Path(__file__).parents[4] / "shared" / "data" / "personachat"
PERSONA = "1 your persona: i have two dogs.\n2 your persona: i paint.\n"
TURNS = "3 hi ! how are you ?\tgood . i paint .\n4 what ?\tdogs .\t\tcats .|dogs .\n"
FIRST = Dialog(
    (
        Message("system", "i have two dogs.\ni paint."),
        Message("user", "hi ! how are you ?"),
        Message("assistant", "good . i paint ."),
        Message("user", "what ?"),
        Message("assistant", "dogs ."),
    )
)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def chat(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"


def one(reply="Hello."):
    return chat(("user", "Hi"), ("assistant", reply))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_persona_chat_file_is_read_in_order(tmp_path, encoding, end):
    text = PERSONA + TURNS + "\n1 partner's persona: i sing.\n2 __SILENCE__\tcafé ?\n"
    path = write(tmp_path / "train.txt", text.replace("\n", end), encoding)
    assert read_personachat(path) == [FIRST, Dialog((Message("assistant", "café ?"),))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hi\tyou\n", "line 1, starts with no number and space, but 1 is next: number the lines"),
        (PERSONA + "5 hi\tyou\n", "line 3, has the number 5, but 3 is next: number the lines of each dialog from 1"),
        ("2 hi\tyou\n", "line 1, has the number 2, but 1 is next: number"),
        (PERSONA + "3 hi you\n", "line 3, has no tab: write the partner's utterance, a tab and the reply"),
        (PERSONA + "3 \tyou\n", "line 3, has an empty utterance of the partner: fill it in"),
        (PERSONA + "3 hi\t \tcandidate\n", "line 3, has an empty reply: fill it in"),
        ("1 your persona: \n2 hi\tyou\n", "line 1, has an empty persona: fill it in or delete"),
        (PERSONA + PERSONA + TURNS, "line 1, starts a dialog without a reply: add its turns or delete it"),
        (PERSONA + TURNS + PERSONA, "line 5, starts a dialog without a reply"),
    ],
)
def test_a_fault_of_a_persona_chat_file_is_one_sentence(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_personachat(write(tmp_path / "train.txt", text))


def test_a_chat_file_is_read_in_order(tmp_path):
    messages = [("system", "Be short."), ("user", " Hi\n"), ("assistant", "Hello."), ("user", "Bye")]
    dialogs = read_chat(write(tmp_path / "a.jsonl", one() + chat(*messages)))
    assert [len(each.messages) for each in dialogs] == [2, 4]
    assert dialogs[1].messages[1] == Message("user", "Hi")
    assert dialogs[1].where == f"{tmp_path / 'a.jsonl'}, line 2,"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Hi"}\n', 'has no list of messages: write {"messages"'),
        ('{"conversations": []}\n', "has no list of messages"),
        ('{"messages": "Hi"}\n', "has no list of messages"),
        (chat(("user", "Hi"), ("human", "Hi")), "has the role 'human' in message 2: give system, user or assistant"),
        ('{"messages": ["Hi"]}\n', "has the role None in message 1"),
        ('{"messages": [{"role": ["user"], "content": "Hi"}]}\n', r"has the role \['user'\] in message 1"),
        ('{"messages": [{"role": "user", "content": [1]}]}\n', "has a content of type list in message 1: give a text"),
        (chat(("user", " "), ("assistant", "Hi")), "has an empty content in message 1: fill it in"),
        (chat(("system", "Hi"), ("user", "Hi")), "has no message of the assistant: add its reply"),
    ],
)
def test_a_fault_of_a_chat_file_is_one_sentence(tmp_path, line, message):
    with pytest.raises(DataError, match=f"line 2, {message}"):
        read_chat(write(tmp_path / "a.jsonl", one() + line))


@pytest.mark.parametrize(("data", "read"), [(PersonaChatData, read_personachat), (ChatData, read_chat)])
def test_encodings_and_empty_files_are_reported(tmp_path, data, read):
    path = tmp_path / f"a{data.suffix}"
    line = "1 hi\tok\n" if data is PersonaChatData else one("ok")
    path.write_bytes(line.encode() + line.replace("ok", "caf\xe9").encode("latin-1"))
    with pytest.raises(DataError, match=r"line 2, is not utf-8 \(byte 0xe9\): give its encoding"):
        read(path)
    write(path, "\n")
    with pytest.raises(DataError, match=r"holds no dialog|has no rows"):
        data(root=str(path)).splits()
    with pytest.raises(ConfigError, match=f"data.root is not given; name .*data.root=/my/train{data.suffix}"):
        data().validate()


def replies(dialogs):
    return [each.messages[-1].content for each in dialogs]


def test_held_out_dialogs_come_from_a_file_or_from_a_fraction(tmp_path):
    train = write(tmp_path / "train.jsonl", "".join(one(f"{i}") for i in range(20)))
    for name in ("valid", "test"):  # test is preferred
        write(tmp_path / f"{name}.jsonl", one(name))
        assert [len(each) for each in ChatData(root=str(tmp_path)).splits()] == [20, 1]
        assert replies(ChatData(root=str(tmp_path)).splits()[1]) == [name]
    other = write(tmp_path / "other.jsonl", one("other"))
    assert replies(ChatData(root=str(train), held_out=str(other)).splits()[1]) == ["other"]
    alone = write(tmp_path / "alone.jsonl", train.read_text())
    split = ChatData(root=str(alone), held_out_fraction=0.2)
    training, held_out = map(replies, split.splits())
    assert 1 <= len(held_out) <= 8
    assert sorted(training + held_out, key=int) == [str(i) for i in range(20)]
    assert replies(split.splits()[1]) == held_out


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"holds no train\.txt: name the training file"):
        PersonaChatData(root=str(tmp_path)).splits()
    path = write(tmp_path / "one.txt", PERSONA + TURNS)
    with pytest.raises(DataError, match=r"has a single example .*give more, or data\.held_out=FILE"):
        PersonaChatData(root=str(path)).splits()
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        PersonaChatData(root=str(path), held_out="/gone.txt").splits()


def test_all_faults_of_a_file_can_be_collected(tmp_path):
    path = write(tmp_path / "train.txt", "1 hi you\n" + PERSONA + TURNS + "1 hi\t \n")
    with collecting_faults() as faults:
        assert read_personachat(path) == [FIRST]
    assert [str(each).split(", ")[1] for each in faults] == ["line 1", "line 6"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the files of Persona-Chat are not here")
def test_the_real_dialogs_have_a_persona_and_alternate():
    training, held_out = PersonaChatData(root=str(REAL)).splits()
    assert (len(training), len(held_out)) == (640, 160)
    for dialog in training:
        roles = [message.role for message in dialog.messages]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
