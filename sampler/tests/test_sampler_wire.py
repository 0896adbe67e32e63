"""What goes over the wire arrives as it was, but for exactly what the dtype takes; anything else is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_sampler._wire import decode_tensors, encode_tensors, pack_logits, unpack_logits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64]


def sent(logits: torch.Tensor, name: str) -> torch.Tensor:
    return unpack_logits(decode_tensors(bytearray(encode_tensors(pack_logits(logits, name))))[0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=4))
def test_tensors_and_metadata_arrive_as_they_were(kinds: list) -> None:
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    found, metadata = decode_tensors(bytearray(encode_tensors(tensors, {"n": "3"})))
    assert metadata == {"n": "3"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_float16_keeps_the_highest_and_is_off_by_a_part_of_the_distance_to_it() -> None:
    logits = torch.randn(4, 3, 5000, generator=torch.Generator().manual_seed(0)) * 20 + 500
    highest = logits.amax(-1, keepdim=True)
    off = (sent(logits, "float16") - logits).abs()
    assert bool((off <= (highest - logits) * 2**-11 + 1e-4).all()), "1e-4: float32 itself, at 500"
    assert torch.equal(sent(logits, "float16").amax(-1), logits.amax(-1))
    assert torch.equal(sent(logits, "float16").argmax(-1), logits.argmax(-1))


@given(
    st.lists(st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=1, max_size=6),
    st.sampled_from([-0.0, 2.0**-14, 0.5, 1.0]),
)
@example([1e-3, 1e-3 + 2e-8], -0.0)
@example([-(2.0**-25), 0.0], 0.5)
@example([-0.0, 0.0], -0.0)
@example([0.0, -0.0], -0.0)
@example([-1e-45, 0.0], -0.0)
def test_float16_keeps_the_highest_apart_from_what_is_close_to_it(close: list[float], to: float) -> None:
    logits = torch.tensor([[close]]) + to
    got = sent(logits, "float16")
    assert torch.equal(got.argmax(-1), logits.argmax(-1))
    assert torch.equal(got == logits.amax(-1, keepdim=True), logits == logits.amax(-1, keepdim=True))
    distance = logits.amax(-1, keepdim=True).double() - logits
    off = (got.double() - logits).abs()
    assert bool((off <= (distance * 2**-11).clamp_min(2**-24) + 1e-9).all()), "1e-9: float32 itself"


def test_float16_cannot_overflow() -> None:
    logits = torch.tensor([[[3e5, 2.9e5, -3e5, 0.0]]])
    assert sent(logits, "float16").tolist()[0][0] == [3e5, pytest.approx(2.9e5, rel=1e-3), -math.inf, -math.inf]


def test_bfloat16_is_off_by_a_part_of_the_logit() -> None:
    logits = torch.randn(2, 2, 5000) * 20
    assert bool(((sent(logits, "bfloat16").float() - logits).abs() <= logits.abs() * 2**-8).all())


@pytest.mark.parametrize(
    ("own", "name"),
    [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32")],
)
def test_what_holds_the_models_own_dtype_loses_nothing(own: torch.dtype, name: str) -> None:
    logits = (torch.randn(2, 2, 50) * 20).to(own)
    assert torch.equal(sent(logits, name).float(), logits.float())


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_logits_that_are_not_numbers_arrive_as_such(name: str) -> None:
    logits = torch.tensor([[[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [-math.inf, 1.0]]])
    assert torch.equal(sent(logits, name).float().nan_to_num(7.0, 8.0, 9.0), logits.nan_to_num(7.0, 8.0, 9.0))


def body(header: object, data: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "wrong",
    [
        bytearray(),
        bytearray(b"GET / HTTP/1.1\r\n\r\n"),
        bytearray(b"\xff" * 64),
        body(b"{"),
        body(b"[" * 9999),
        body([]),
        body({"a": 1}),
        body({"a": []}),
        body({"a": {}}),
        body({"__metadata__": {"n": 1}}),
        body({"__metadata__": []}),
        body({"a": entry()}),
        body({"a": entry()}, b"12345678"),
        body({"a": entry(dtype="U8")}, b"1234"),
        body({"a": entry(dtype=None)}, b"1234"),
        body({"a": entry(shape=[2])}, b"1234"),
        body({"a": entry(shape=[-1])}, b"1234"),
        body({"a": entry(shape=[True])}, b"1234"),
        body({"a": entry(shape=[1 << 40, 1 << 40])}, b"1234"),
        body({"a": entry(shape=[1 << 47] * 7 + [0], offsets=[0, 0])}),
        body({"a": entry(shape=[0, 1 << 32, 1 << 32], offsets=[0, 0])}),
        body({"a": entry(shape="1")}, b"1234"),
        body({"a": entry(offsets=[4, 8])}, b"12345678"),
        body({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}, b"12345678"),
        body({"a": entry(offsets=None)}, b"1234"),
        body({"a": entry(shape=[1], offsets=[0, 2], dtype="F16"), "b": entry(offsets=[2, 6])}, b"123456"),
    ],
)
def test_what_is_no_tensors_is_refused(wrong: bytearray) -> None:
    with pytest.raises(ValueError, match="body|tensor"):
        decode_tensors(wrong)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_refused_or_changes_values_only(data: st.DataObject) -> None:
    good = bytearray(encode_tensors({"ids": torch.arange(6).int().view(2, 3), "x": torch.ones(2)}, {"n": "1"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    good = good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good
    try:
        tensors, _ = decode_tensors(good)
    except ValueError:
        return
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) < len(good)
