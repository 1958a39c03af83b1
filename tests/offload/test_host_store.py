"""Host memory: blocks, their reuse, and files that leave nothing."""

import gc
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.host_bytes import host_bytes, is_in_host_memory
from memsave.offload import host_store
from memsave.offload.host_store import ALIGNMENT, SMALLEST, HostStore

CPU = torch.device("cpu")


@pytest.fixture
def store(device, tmp_path):
    return HostStore(torch.device(device), folder=tmp_path)


def block(store, size):
    like = torch.empty(0, device=store.device)
    return store.allocate(size, like=like)


def test_a_block_is_one_storage_of_its_size_and_counts_until_it_dies(store):
    before = host_bytes()
    one = block(store, 1000)
    assert one.untyped_storage().nbytes() == one.numel() == 1000
    assert one.dtype == torch.uint8 and one.device == CPU
    assert is_in_host_memory(one.untyped_storage()) and not is_in_host_memory(torch.zeros(1).untyped_storage())
    assert host_bytes() == before + 1000
    view = one[10:]
    del one
    assert host_bytes() == before + 1000
    del view
    assert host_bytes() == before


def test_blocks_do_not_overlap_and_keep_their_values_when_pages_are_released(store):
    blocks = [block(store, 5000 + number).fill_(number) for number in range(20)]
    for each in blocks:
        store.release_pages(each)
    assert all((each == number).all() for number, each in enumerate(blocks))


def test_memory_is_reused(store):
    for _ in range(10):
        blocks = [block(store, size) for size in (3 * ALIGNMENT, 100, 5 * ALIGNMENT)]
        capacity = store.capacity
        del blocks
    assert store.capacity == capacity


def test_free_neighbours_are_merged(store):
    blocks = [block(store, SMALLEST // 8) for _ in range(8)]
    capacity = store.capacity
    for number in (3, 1, 2, 0, 7, 5, 6, 4):
        blocks[number] = None
    whole = block(store, capacity)
    assert store.capacity == capacity == len(whole)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40_000)), max_size=30))
def test_blocks_are_disjoint_in_any_order_of_allocations_and_releases(steps):
    store, alive = HostStore(CPU), []
    for number, (frees, size) in enumerate(steps):
        if frees and alive:
            alive.pop(size % len(alive))
        else:
            alive.append((number % 251, block(store, size).fill_(number % 251)))
    assert all((each == value).all() for value, each in alive)
    assert sum(-(-len(each) // ALIGNMENT) * ALIGNMENT for _, each in alive) <= store.capacity


def test_a_fake_block_has_a_size_and_no_memory():
    with FakeTensorMode():
        store, like, before = HostStore(CPU), torch.zeros(1), host_bytes()
        fake = store.allocate(1 << 45, like=like)
        assert host_bytes() == before + (1 << 45) and is_in_host_memory(fake.untyped_storage())
        del fake
        assert host_bytes() == before and not store.capacity


def test_files_have_no_name(tmp_path):
    store = HostStore(CPU, folder=tmp_path)
    held = block(store, 1 << 20)
    assert not list(tmp_path.iterdir()) and len(held) == 1 << 20


def test_a_killed_process_leaves_no_file(tmp_path):
    program = f"""
        import os, pathlib, signal, torch
        from memsave.offload import ActivationOffload
        model = torch.nn.Linear(64, 64)
        with ActivationOffload(model, min_bytes=1, folder=pathlib.Path({str(tmp_path)!r}))():
            y = model(torch.ones(64, 64)).exp()
        from memsave.host_bytes import host_bytes
        print(host_bytes(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and int(done.stdout) >= 2 * 64 * 64 * 4, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_store.os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=rf"no space for \d+ bytes of offloaded tensors in {tmp_path}; name another folder"
    ):
        block(HostStore(CPU, folder=tmp_path), 100)


def test_the_store_may_die_before_its_blocks(store):
    held = block(store, 100).fill_(7)
    del store
    gc.collect()
    assert (held == 7).all()
