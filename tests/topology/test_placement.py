"""Topology: sizes, devices, placement, and the TOML file."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.errors import TopologyError
from chipbus.topology import MAX_CHIPS, ChipPlace, Device, ParallelConfig, Topology


def refusal(**settings: object) -> str:
    with pytest.raises(TopologyError) as caught:
        Topology.of(**settings)  # type: ignore[arg-type]
    return str(caught.value)


def test_chips_have_stable_names_and_take_the_devices_in_order():
    topology = Topology.of(2, devices="cpu:3,cpu:1")
    assert topology.chips == (
        ChipPlace("chip.0.0", 0, 0, Device("cpu", 3)),
        ChipPlace("chip.1.0", 1, 0, Device("cpu", 1)),
    )
    assert [(r.name, r.replica, r.dp_rank) for r in topology.replicas] == [("replica.0", 0, 0), ("replica.1", 1, 1)]


def test_devices_default_to_the_first_of_the_chosen_kind():
    assert Topology.of(3, chip="null") == Topology.of(3, devices=["null:0", "null:1", "null:2"])
    assert [str(device) for device in Topology.of().devices] == ["cpu:0"]


@pytest.mark.guarantee("T1")
@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, print_blob=True)
def test_devices_are_cut_in_order_into_one_group_per_replica(dp, tp, random):
    indices = random.sample(range(100), dp * tp)
    topology = Topology(ParallelConfig(dp, tp), [f"cpu:{index}" for index in indices])
    groups = [indices[i : i + tp] for i in range(0, dp * tp, tp)]
    assert [[chip.device.index for chip in replica.chips] for replica in topology.replicas] == groups
    assert [chip.name for chip in topology.chips] == [f"chip.{r}.{k}" for r in range(dp) for k in range(tp)]
    assert all(chip.rank == k for replica in topology.replicas for k, chip in enumerate(replica.chips))


@pytest.mark.guarantee("T4")
@pytest.mark.parametrize("name", ["data_parallel_size", "tensor_parallel_size"])
@pytest.mark.parametrize("value", [0, -1, True, False, "2", 1.0, None])
def test_a_size_that_is_no_positive_integer_is_refused_by_name_and_value(name, value):
    assert refusal(**{name: value}) == f"{name} is {value!r}; it must be an integer of at least 1"


@pytest.mark.guarantee("T2")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"devices": "cpu:0,cpu:1"},
            "2 devices are given (cpu:0, cpu:1); data_parallel_size 1 x tensor_parallel_size 1",
        ),
        ({"data_parallel_size": 2, "devices": "cpu:0"}, "needs 2"),
        ({"data_parallel_size": 2, "devices": "cpu:0,cpu:0"}, "device cpu:0 is given twice"),
        ({"data_parallel_size": 2, "devices": "cpu:0,null:0"}, "mix the kinds cpu and null"),
        ({"devices": "gpu:0"}, "chip kind 'gpu' is unknown; did you mean 'cpu'?"),
        ({"devices": "abacus:0"}, "chip kind 'abacus' is unknown; known: cpu, cuda, null"),
        ({"chip": 3}, "chip kind 3 is unknown"),
        ({"devices": "cpu"}, "device 'cpu' is not KIND:INDEX"),
        ({"devices": "cpu:-1"}, "device 'cpu:-1' is not KIND:INDEX"),
        ({"devices": "cpu:00"}, "device 'cpu:00' is not KIND:INDEX"),
        ({"devices": "cpu:0,"}, "device '' is not KIND:INDEX"),
        ({"devices": ""}, "device '' is not KIND:INDEX"),
        ({"devices": []}, "0 devices are given"),
        ({"devices": [None]}, "device None is not KIND:INDEX"),
        ({"devices": 7}, "devices is 7"),
        ({"layers": 14}, "layers is 14"),
        ({"layers": "5:10"}, "use 0:10 or 5:output"),
        ({"data_parallel_size": MAX_CHIPS + 1}, f"at most {MAX_CHIPS}"),
        ({"data_parallel_size": 10**12, "tensor_parallel_size": 10**12}, f"at most {MAX_CHIPS}"),
    ],
)
def test_an_impossible_topology_is_refused_with_the_value_and_the_rule(settings, says):
    assert says in refusal(**settings)


@pytest.mark.guarantee("T3")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2; tensor parallelism comes in a later version, use 1"),
        ({"layers": "0:14"}, "layers 0:14 is a forward split; layer splits come in a later version"),
        ({"layers": "0:14", "num_layers": 28}, "leaves layers 15 to 27 to other stages"),
        ({"layers": "14:output", "num_layers": 28}, "leaves layers 0 to 13"),
        ({"layers": "0:3,20:output", "num_layers": 28}, "is a sandwich split that leaves layers 4 to 19"),
        ({"layers": "0:28", "num_layers": 28}, "ends at layer 28; the model's last layer is 27"),
        ({"tensor_parallel_size": 2, "devices": "cpu:0"}, "needs 2"),
    ],
)
def test_what_comes_later_is_validated_and_then_refused_with_a_sentence(settings, says):
    assert says in refusal(**settings)


def test_naming_every_layer_is_no_split():
    assert Topology.of(layers="0:output", num_layers=28).parallel.num_chips == 1


def test_a_toml_file_says_the_same_as_the_arguments(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text('data_parallel_size = 2\ndevices = ["cpu:0", "cpu:1"]\n')
    assert Topology.from_toml(path) == Topology.of(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data_paralel_size = 2", "no setting 'data_paralel_size'; did you mean 'data_parallel_size'?"),
        ("wheels = 4", "known: data_parallel_size"),
        ("data_parallel_size = true", "data_parallel_size is True"),
        ("data_parallel_size = ", "is not TOML"),
        ("num_layers = 3", "no setting 'num_layers'"),
        (b"\xff\xfe", "is not TOML"),
    ],
)
def test_a_wrong_topology_file_is_refused_by_name(tmp_path, text, says):
    path = tmp_path / "wrong.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TopologyError) as caught:
        Topology.from_toml(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_topology_file_is_refused_by_name(tmp_path):
    with pytest.raises(TopologyError, match=r"none\.toml cannot be read: No such file"):
        Topology.from_toml(tmp_path / "none.toml")
