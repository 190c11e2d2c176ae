"""Every attention kernel against a dense softmax under the mask rule, on any forest; on a GPU the real ones too.

Off a GPU, FlexAttention runs uncompiled, and the variable-length kernel's part is played by one written here from its
documentation: what is tested then is the layout that these are given.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import EXAMPLES, KeepFloat64, build, example
from torch import Tensor

from spl.data.collate import EncodedExample, collate
from spl.logprobs import forest, kernels
from spl.logprobs.forest import Backend, Forest
from spl.logprobs.kernels import KERNELS, choose, why_not
from spl.logprobs.score import prepare, score
from spl.types import PreferenceBatch, UserError

HEADS, KEY_HEADS, DIM = 4, 2, 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # its tracing looks
]


def tensors(batch: PreferenceBatch, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, batch.num_tokens, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]


def dense(
    batch: PreferenceBatch, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Token i sees token j where j <= i < subtree_end[j], and no deeper than the window above it."""
    i, j = torch.arange(batch.num_tokens)[:, None], torch.arange(batch.num_tokens)[None, :]
    seen = (j <= i) & (i < batch.subtree_end[None, :])
    if window is not None:
        seen &= batch.position_ids[:, None] - batch.position_ids[None, :] < window
    k, v = k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)
    scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(seen, scores, -torch.inf)
    return torch.einsum("nhqk,nhkd->nqhd", scores.softmax(-1), v)


def loop_over_sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn by its documentation; the last query is aligned with the last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    assert query.shape[1] == key.shape[1] or enable_gqa
    left, right = window_size
    outputs = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]]
        k, v = (x[cu_seq_k[n] : cu_seq_k[n + 1]].repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
        back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None, :]
        seen = (back >= -right) & ((back <= left) if left >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", torch.where(seen, scores, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture(params=[True, False], ids=["grouped", "expanded"])
def grouped(request: pytest.FixtureRequest) -> bool:
    """Whether the variable-length kernel takes fewer key heads than query heads, which torch 2.11's does not."""
    return bool(request.param)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> Iterator[None]:
    """Small blocks, so that a small forest has many, and the kernel that takes a GPU played by the loop."""
    monkeypatch.setattr(forest, "BLOCK", 8)
    monkeypatch.setattr(kernels, "_varlen_kernel", lambda: (loop_over_sequences, grouped))
    # It refuses gradients on a CPU, although its uncompiled form has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    yield


def assert_same(
    backend: Backend, batch: PreferenceBatch, window: int | None, softcap: float | None, tolerance: float = 1e-12
) -> None:
    """Values and gradients of a kernel are those of the dense softmax."""
    q, k, v = tensors(batch)
    expected = dense(batch, q, k, v, 0.3, window, softcap)
    actual = KERNELS[backend](q, k, v, Forest(batch), 0.3, window, softcap)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    for a, e in zip(
        torch.autograd.grad((actual * upstream).sum(), (q, k, v)),
        torch.autograd.grad((expected * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * 10)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(
    ("backend", "softcap"), [("sdpa", None), ("sdpa", 1.5), ("flex", None), ("flex", 1.5), ("varlen", None)]
)
def test_equals_dense_attention_under_the_mask_rule(
    backend: Backend, window: int | None, softcap: float | None
) -> None:
    assert_same(backend, collate(EXAMPLES), window, softcap)


# Few words, so that responses often begin alike, repeat, or begin one another.
TOKENS = st.integers(3, 5)
RESPONSES = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=5)
FORESTS = st.lists(
    st.builds(lambda p, rs: example(p, *rs), st.lists(TOKENS, min_size=1, max_size=9), RESPONSES),
    min_size=1,
    max_size=4,
)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("backend", KERNELS)
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(examples=FORESTS, window=st.none() | st.integers(1, 12))
def test_any_forest(backend: Backend, examples: list[EncodedExample], window: int | None) -> None:
    assert_same(backend, collate(examples), window, None)


@pytest.mark.parametrize("window", [None, 5, 40])
def test_blocks_that_are_left_out_hold_nothing_to_see(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every (query, key) pair by enumeration: in a block left out none is seen, in one called full all are."""
    monkeypatch.setattr(forest, "BLOCK", 8)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 30, (n,), generator=draw).tolist() for n in (30, 20, 9, 50, 3, 60)]
    batch = collate([example(texts[0], *texts[1:3]), example(texts[3], *texts[4:])])
    i, j = torch.arange(batch.num_tokens)[:, None], torch.arange(batch.num_tokens)[None, :]
    seen = (j <= i) & (i < batch.subtree_end[None, :])
    if window is not None:
        seen &= batch.position_ids[:, None] - batch.position_ids[None, :] < window
    mask = Forest(batch).block_mask(window)
    kinds = {"none": 0, "some": 0, "all": 0}
    for row in range(-(-batch.num_tokens // 8)):
        partial = set(mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist())
        full = set(mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist())
        assert not partial & full
        for column in range(-(-batch.num_tokens // 8)):
            block = seen[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            kind = "all" if column in full else "some" if column in partial else "none"
            kinds[kind] += 1
            assert kind == "some" or bool(block.all() if kind == "all" else not block.any())
    assert kinds["none"] > kinds["some"] > 0
    assert window == 5 or kinds["all"] > 0


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("backend", ["flex", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral_window_4", "gemma2_window_4", "gpt2"])
def test_a_whole_model(backend: Backend, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "varlen" and family.startswith("gemma2"):
        pytest.skip("its kernel knows no soft-cap")
    monkeypatch.setattr(kernels, "why_not", lambda *_: None)
    model, batch = build(family, torch.float64), collate(EXAMPLES)
    results, gradients = [], []
    for scorer in ("forest", "plain"):
        prepare(model, scorer)
        model.zero_grad()
        with KeepFloat64():
            result = score(model, batch, scorer, backend=backend)
            (result.logps * torch.linspace(-1, 2, len(result.logps))).sum().backward()
        results.append(result)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[0].per_token_logps, results[1].per_token_logps, rtol=0, atol=1e-9)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-9, atol=1e-9)


def test_under_autocast_a_kernel_is_given_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave query and key in float32, while the value is a product in bfloat16."""
    given_: list[torch.dtype] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        given_.extend(x.dtype for x in (q, k, v))
        return kernels.sdpa(q, k, v, *rest)

    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    model = build("llama")
    prepare(model, "forest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score(model, collate(EXAMPLES))
    assert set(given_) == {torch.bfloat16}


class TestChoice:
    query = torch.zeros(1, 2, 3, 64)

    def test_auto_takes_what_runs_anywhere_off_a_gpu(self) -> None:
        assert choose("auto", self.query, None) == "sdpa"

    @pytest.mark.parametrize("backend", ["flex", "varlen"])
    def test_one_that_cannot_run_is_an_error_that_says_why(self, backend: Backend) -> None:
        sentence = f"model.attention {backend} cannot run: it trains on CUDA devices alone, and this is cpu."
        with pytest.raises(UserError, match=sentence):
            choose(backend, self.query, None)

    @pytest.mark.parametrize(
        ("backend", "dtype", "head_dim", "softcap", "reason"),
        [
            ("varlen", torch.float32, 64, None, "takes bfloat16, not float32"),
            ("varlen", torch.bfloat16, 64, 30.0, "soft-cap"),
            ("varlen", torch.bfloat16, 512, None, "at most 256 numbers, a multiple of 8, and these have 512"),
            ("varlen", torch.bfloat16, 60, None, "a multiple of 8, and these have 60"),
            ("varlen", torch.bfloat16, 64, None, None),
            ("flex", torch.float32, 64, 30.0, None),
            ("sdpa", torch.float32, 512, 30.0, None),
        ],
    )
    def test_with_a_gpu(
        self, backend: Backend, dtype: torch.dtype, head_dim: int, softcap: float | None, reason: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
        found = why_not(backend, torch.device("cuda"), dtype, head_dim, softcap)
        assert found is None if reason is None else found is not None and reason in found

    def test_with_an_old_gpu_or_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "8.0" in str(why_not("varlen", torch.device("cuda"), torch.bfloat16))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
        assert "Triton" in str(why_not("flex", torch.device("cuda"), torch.float32))


def on_gpu(batch: PreferenceBatch) -> PreferenceBatch:
    return PreferenceBatch(*(x.cuda() if isinstance(x, Tensor) else x for x in batch))


def long_batch() -> PreferenceBatch:
    """Longer than several blocks of 128."""
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 30, (n,), generator=draw).tolist() for n in (300, 200, 90, 500, 3, 130)]
    return collate([example(texts[0], *texts[1:3]), example(texts[3], *texts[4:])])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("sdpa", torch.float32, 1e-4), ("flex", torch.float32, 1e-4), ("flex", torch.bfloat16, 0.05),
     ("varlen", torch.bfloat16, 0.05)],
)  # fmt: skip
def test_on_a_gpu(backend: Backend, dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    batch = long_batch()
    exact = tensors(batch)
    expected = dense(batch, *exact, 0.3, window, None)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad((expected * upstream).sum(), exact)
    moved = tensors(batch, dtype, "cuda")
    actual = KERNELS[choose(backend, moved[0], None)](*moved, Forest(on_gpu(batch)), 0.3, window, None)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance)
    found = torch.autograd.grad((actual * upstream.to("cuda", dtype)).sum(), moved)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double().cpu(), e, rtol=0, atol=tolerance * max(1.0, e.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_auto_on_a_gpu_takes_flash_attention_for_bfloat16_and_flex_otherwise() -> None:
    half, whole = (torch.zeros(1, 2, 3, 64, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32))
    assert choose("auto", half, None) == "varlen"
    assert choose("auto", half, 30.0) == choose("auto", whole, None) == "flex"
