"""The time of a step against counts by hand, and what must hold of any."""

import math
from dataclasses import replace

import pytest
from held import random_pairs
from test_memory import make_module

from spl.data.collate import EncodedExample
from spl.modules.flops import matrix_sizes
from spl.modules.memory import Setup, peak_memory
from spl.modules.shape import shape_of
from spl.planning.fits import fit_on, smallest_fit
from spl.planning.gpus import GPUS
from spl.planning.step import Model, step_time
from spl.planning.traffic import Cluster, Collective
from spl.planning.work import Work

H100 = GPUS["h100-80gb"]


@pytest.fixture(scope="module")
def model() -> Model:
    policy = make_module("llama", 0, False, "float32").policy
    return Model(shape_of(policy), matrix_sizes(policy))


@pytest.fixture(scope="module")
def work() -> Work:
    examples = [EncodedExample(((k,) * 90, (k,) * 60 + (9,) * 40), (60, 60), (), None, str(k)) for k in range(8)]
    return Work(tuple(examples), 4, 2, None, "made up")


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_rings_send_what_is_said(devices: int) -> None:
    """Simulated: chunk c of a tensor of one chunk a device travels along the ring."""
    held = [{k} for k in range(devices)]
    sent = [0] * devices
    for step in range(devices - 1):  # gathering: each passes on the chunk that it got last
        for k in range(devices):
            chunk = (k - step) % devices
            assert chunk in held[k]
            held[(k + 1) % devices].add(chunk)
            sent[k] += 1
    assert all(len(chunks) == devices for chunks in held)
    size = 100.0 * devices
    gather = Collective("all_gather", size, 1).sent(devices)
    assert gather == pytest.approx(100 * sent[0])
    # Reducing is the same way round; reducing everywhere is reducing and then gathering.
    assert Collective("reduce_scatter", size, 3).sent(devices) == pytest.approx(3 * gather)
    assert Collective("all_reduce", size, 1).sent(devices) == pytest.approx(2 * gather)


def test_seconds_of_a_ring_by_hand() -> None:
    one = Cluster(H100, 8)  # a node: 7 hops of NVLink, at 0.8 * 450 GB/s
    assert one.seconds(Collective("all_gather", 8e9, 2)) == pytest.approx(2 * (8.4e-6 + 7 * 3.4e-6 + 7e9 / 360e9))
    two = Cluster(H100, 16)  # 15 hops, one of them through the network, at 0.8 * 400 GB/s
    by_hand = 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15e9 / 320e9
    assert two.seconds(Collective("reduce_scatter", 16e9, 1)) == pytest.approx(by_hand)
    many = Cluster(H100, 1024)  # two trees: 7 hops within a node, log2(128) = 7 between nodes
    latency = 8.4e-6 + 2 * (7 * 3.4e-6 + 7 * 14e-6)
    assert many.latency("all_reduce") == pytest.approx(latency)
    slow = Cluster(GPUS["rtx4090-24gb"], 8)
    assert slow.seconds(Collective("all_gather", 8e9, 1)) == pytest.approx(8.4e-6 + 7 * 5.7e-6 + 7e9 / 25.6e9)
    apart = Cluster(H100, 4, per_node=1)
    assert apart.latency("all_gather") == pytest.approx(8.4e-6 + 3 * 14e-6)
    assert Cluster(H100, 1).seconds(Collective("all_reduce", 8e9, 1)) == 0


def test_one_gpu_computes(model: Model, work: Work) -> None:
    taken = step_time(model, work, Setup(), Cluster(H100, 1), reference=True, mfu=0.5)
    update = 7 * 4 * model.shape.trained / H100.bandwidth
    assert taken.compute == pytest.approx(work.flops(model.sizes, True) / (0.5 * H100.float32) + update)
    assert (taken.sent, taken.lost, taken.tokens) == (0, 0, work.tokens)
    mixed = step_time(model, work, Setup(mixed=True), Cluster(H100, 1), reference=True, mfu=0.5)
    assert (taken.compute - update) / (mixed.compute - update) == pytest.approx(H100.bf16 / H100.float32)
    again = step_time(model, work, Setup(checkpointing=True), Cluster(H100, 1), reference=True, mfu=0.5)
    assert 1.15 < (again.compute - update) / (taken.compute - update) < 1.26  # one of four or five passes more


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_traffic_is_lost_as_far_as_nothing_hides_it(model: Model, work: Work, layout: str) -> None:
    shares = []
    for devices in (2, 8, 64, 512):
        setup = Setup(layout, devices, reference_copy=True)  # type: ignore[arg-type]
        taken = step_time(model, work, setup, Cluster(H100, devices), reference=True, mfu=0.4)
        assert 0 <= taken.lost <= taken.traffic
        assert taken.seconds == taken.compute + taken.lost
        assert taken.traffic <= taken.seconds  # traffic and operations run beside each other, not faster
        shares.append(taken.lost_share)
    assert shares == sorted(shares)


def test_bytes_of_a_sharded_step_by_hand(model: Model, work: Work) -> None:
    setup = Setup("fsdp", 4, mixed=True, reference_copy=True, sums_whole=True)
    taken = step_time(model, work, setup, Cluster(H100, 4), reference=True, mfu=0.4)
    layers = 3 * model.shape.layer_bytes / 2  # in bfloat16
    gathered = 2 * 3 * (layers + model.shape.root_bytes)  # two micro-batches: reference, forward, backward
    assert taken.sent == pytest.approx(3 / 4 * (gathered + 4 * model.shape.trained))
    every = step_time(model, work, replace(setup, sums_whole=False), Cluster(H100, 4), reference=True, mfu=0.4)
    assert every.sent - taken.sent == pytest.approx(3 / 4 * 4 * model.shape.trained)


def test_the_smallest_way_fits_and_smaller_ones_do_not(model: Model, work: Work) -> None:
    shape, setup = model.shape, Setup(reference_copy=True)
    one = peak_memory(shape, work.largest[0][1], setup).total
    assert smallest_fit(shape, work, setup, H100) == (setup, None, False, peak_memory(shape, work.largest[0][1], setup))
    tight = smallest_fit(shape, work, setup, H100._replace(memory=one - 1))
    assert tight is not None
    assert (tight.setup.devices, tight.setup.checkpointing, tight.memory.total < one) == (1, True, True)
    assert smallest_fit(shape, work, setup, H100._replace(memory=1e6)) is None

    # What every way on one device takes at the least, and less than that: more devices.
    least = min(peak_memory(shape, batch, replace(setup, checkpointing=True)).total for _, batch in work.largest)
    more = smallest_fit(shape, work, setup, H100._replace(memory=least - 1))
    assert more is not None
    assert (more.setup.layout, more.setup.devices > 1) == ("fsdp", True)
    half = more.setup.devices // 2
    assert fit_on(half, shape, work, setup, H100._replace(memory=least - 1)) is None
    assert math.log2(more.setup.devices).is_integer()


def test_smaller_budgets_are_tried_before_more_devices(model: Model, work: Work) -> None:
    setup = Setup(reference_copy=True, checkpointing=True)
    whole, least = (peak_memory(model.shape, work.largest[k][1], setup).total for k in (0, -1))
    fit = smallest_fit(model.shape, work, setup, H100._replace(memory=(whole + least) / 2))
    assert fit is not None
    assert fit.setup.devices == 1
    assert fit.max_tokens in [budget for budget, _ in work.largest[1:]]


def test_gradients_are_shared_out_each_time_only_where_whole_ones_do_not_fit(model: Model) -> None:
    few = EncodedExample(((1, 2, 3), (1, 2, 4)), (2, 2), (), None, "")  # what is held is weights
    work, setup = Work((few,), 1, 2, None, "made up"), Setup(sums_whole=True, reference_copy=True)
    batch = work.largest[0][1]
    whole = peak_memory(model.shape, batch, replace(setup, layout="fsdp", devices=8)).total
    each = peak_memory(model.shape, batch, replace(setup, layout="fsdp", devices=8, sums_whole=False)).total
    assert each < whole
    for memory, reduces in ((whole, False), ((whole + each) / 2, True)):
        fit = fit_on(8, model.shape, work, setup, H100._replace(memory=memory))
        assert fit is not None
        assert (fit.reduces_each, fit.setup.sums_whole, fit.setup.checkpointing) == (reduces, not reduces, False)


def test_memory_of_a_batch_of_nothing_else(model: Model) -> None:
    """More tokens take more, alike for every layout."""
    totals = [peak_memory(model.shape, random_pairs(512, n, n, 2), Setup()).total for n in (16, 64, 256)]
    assert totals == sorted(totals)
