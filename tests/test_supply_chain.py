"""Files that run a command when they are unpickled, and models that bring code, in every place that reads files."""

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

from spl.cli import main
from spl.data.hub import load_hub
from spl.data.source import Source
from spl.encoder import SentenceEncoder
from spl.logprobs.cache import LogpCache
from spl.models import load_model, load_policy, load_tokenizer, save_policy
from spl.modules.preference import PreferenceModule
from spl.types import UserError

TINY = ["--config", str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")]


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plain(path: Path, evil: Evil) -> None:
    path.write_bytes(pickle.dumps(evil))


def zipped(path: Path, evil: Evil) -> None:
    """As torch.save writes it."""
    torch.save({"weight": evil}, path)


@pytest.fixture
def evil(tmp_path: Path) -> Evil:
    return Evil(tmp_path / "was-here")


def refused(do: Callable[[], Any], evil: Evil, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        do()
    assert "\n" not in str(raised.value)
    assert not evil.mark.exists()


def test_the_pickle_is_evil(evil: Evil, tmp_path: Path) -> None:
    plain(tmp_path / "a.pkl", evil)
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert evil.mark.exists()


@pytest.mark.parametrize("write", [plain, zipped])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "shard.bin", "listed.pt"])
def test_a_models_weights(tmp_path: Path, evil: Evil, write: Callable[[Path, Evil], None], name: str) -> None:
    folder = tmp_path / "model"
    load_model("tiny").config.save_pretrained(folder)
    write(folder / name, evil)
    if name == "shard.bin":  # an index of safetensors that names another kind of file
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name == "listed.pt":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    refused(lambda: load_model(str(folder)), evil, "cannot load '.*model'")


@pytest.mark.parametrize("write", [plain, zipped])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapters_weights(
    tmp_path: Path, evil: Evil, tiny_tokenizer: Any, write: Callable[[Path, Evil], None], name: str
) -> None:
    folder = tmp_path / "adapter"
    save_policy(load_policy("tiny", lora_rank=2), tiny_tokenizer, folder, "adapter", torch.arange(9)[None])
    (folder / "adapter_model.safetensors").unlink()
    write(folder / name, evil)
    refused(lambda: load_model(str(folder)), evil, "cannot load the adapter '.*adapter'")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_weights_are_not_unpickled_where_that_would_be_safe(tmp_path: Path, tiny_tokenizer: Any, index: str) -> None:
    """Pickles of tensors alone, which torch would open: one way in is one too many."""
    model = load_model("tiny")
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    model.config.save_pretrained(folder)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.save(weights, folder / "shard.bin")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.bin")}))
    if index.startswith("other"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": index}))
    with pytest.raises(UserError, match=rf"its {index} names shard\.bin, which is no safetensors file"):
        load_model(str(folder))
    save_policy(load_policy("tiny", lora_rank=2), tiny_tokenizer, adapter, "adapter", torch.arange(9)[None])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected its weights as adapter_model\.safetensors"):
        load_model(str(adapter))


@pytest.mark.parametrize("place", [".", "2_Dense"])
def test_an_encoders_weights_are_not_unpickled_where_that_would_be_safe(tmp_path: Path, place: str) -> None:
    pytest.importorskip("sentence_transformers")
    load_model("tiny").save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / place / "pytorch_model.bin")
    if place == ".":
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled: expected weights as model\.safetensors"):
        SentenceEncoder(str(tmp_path)).encode(["a"], torch.device("cpu"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model"])
def test_a_tokenizers_files(tmp_path: Path, evil: Evil, name: str) -> None:
    load_model("tiny").config.save_pretrained(tmp_path / "model")
    plain(tmp_path / "model" / name, evil)
    refused(lambda: load_tokenizer(str(tmp_path / "model")), evil, "cannot load '.*model'")


@pytest.mark.parametrize("write", [plain, zipped])
def test_a_checkpoint(
    tmp_path: Path, evil: Evil, capsys: pytest.CaptureFixture[str], write: Callable[[Path, Evil], None]
) -> None:
    write(tmp_path / "evil.ckpt", evil)
    with pytest.raises(SystemExit):
        main(["validate", *TINY, "--ckpt_path", str(tmp_path / "evil.ckpt"), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not evil.mark.exists()


def test_a_reference_cache(tmp_path: Path, evil: Evil) -> None:
    first = LogpCache(tmp_path, "weights", "float32")
    first.add([b"0" * 16], [-1.0])
    first.write()
    (file,) = tmp_path.rglob("*.safetensors")
    plain(file, evil)
    refused(lambda: LogpCache(tmp_path, "weights", "float32"), evil, "is damaged")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.json"])
def test_a_data_file(tmp_path: Path, evil: Evil, name: str) -> None:
    plain(tmp_path / name, evil)
    with pytest.raises(UserError) as raised:
        for where, row in Source(str(tmp_path / name)).rows():
            raise UserError(f"{where}: {row}")  # bytes may be a csv's text
        raise UserError(f"{tmp_path / name} has no row")  # or its header
    assert str(tmp_path / name) in str(raised.value)
    assert not evil.mark.exists()


def test_a_parquet_file_whose_columns_have_a_pickled_type(tmp_path: Path, evil: Evil) -> None:
    marks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(evil)}
    fields = [pyarrow.field(name, pyarrow.string(), metadata=marks) for name in ("prompt", "chosen", "rejected")]
    table = pyarrow.table([["p"], ["a"], ["b"]], schema=pyarrow.schema(fields))
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in Source(str(tmp_path / "a.parquet")).rows()]
    assert rows == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert not evil.mark.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "set.py", "rows.tar"])
def test_a_data_set_of_the_hub(tmp_path: Path, evil: Evil, name: str) -> None:
    """By a folder that `datasets` opens as it opens a data set of the Hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    if name == "set.py":
        (folder / name).write_text(f"import os\nos.mkdir({str(evil.mark)!r})\n")
    elif name == "rows.tar":
        for member, write in (("a.pyd", plain), ("a.pickle", plain), ("a.pth", zipped)):
            write(tmp_path / member, evil)
        with tarfile.open(folder / name, "w") as file:
            for member in ("a.pyd", "a.pickle", "a.pth"):
                file.add(tmp_path / member, member)
    else:
        plain(folder / name, evil)
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"cannot load|no data file"):
            for row in load_hub(str(folder), None, "train", streaming):
                raise UserError(f"no data file: {row}")
        assert not evil.mark.exists()
    with pytest.raises(UserError, match="holds no data file"):
        list(Source(str(folder)).rows())


@pytest.mark.parametrize("write", [plain, zipped])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "2_Dense/pytorch_model.bin", "model.safetensors"])
def test_a_sentence_encoder(tmp_path: Path, evil: Evil, write: Callable[[Path, Evil], None], name: str) -> None:
    pytest.importorskip("sentence_transformers")
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "2_Dense", "type": f"{kind}.Dense"},
    ]
    folder = tmp_path / "encoder"
    model = load_model("tiny")
    model.save_pretrained(folder) if "Dense" in name else model.config.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 64, "out_features": 8}')
    (folder / "modules.json").write_text(json.dumps(modules))
    write(folder / name, evil)
    with pytest.raises(UserError, match="cannot be loaded"):
        SentenceEncoder(str(folder)).encode(["a"], torch.device("cpu"))
    assert not evil.mark.exists()


def test_a_sentence_encoder_that_names_a_class(tmp_path: Path, evil: Evil, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "evil_package.py").write_text(f"import os\nos.mkdir({str(evil.mark)!r})\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "encoder"
    folder.mkdir()
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil_package.Layer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil_package.py").write_text((tmp_path / "evil_package.py").read_text())
    with pytest.raises(UserError, match="cannot be loaded"):
        SentenceEncoder(str(folder)).encode(["a"], torch.device("cpu"))
    assert not evil.mark.exists()


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({mark!r}).mkdir(exist_ok=True)
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path, evil: Evil, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    load_model("tiny").save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(evil.mark)))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_code_of_a_model_runs_only_where_that_model_is_named(own: Path, evil: Evil) -> None:
    sentence = (
        f"needs code of its own to run: read that code, and if you trust it, set model.trust_remote_code to {own}"
    )
    refused(lambda: load_model(str(own)), evil, sentence)
    refused(lambda: load_model(str(own), trust_remote_code="owner/another"), evil, sentence)
    module = PreferenceModule(str(own), trust_remote_code=str(own))
    module.configure_model()
    assert evil.mark.exists()
    assert module.describe()["remote code"] == f"runs, from {own}"


def test_a_trusted_model_may_not_pass_the_trust_on(own: Path, evil: Evil) -> None:
    settings = json.loads((own / "config.json").read_text())
    settings["auto_map"]["AutoModelForCausalLM"] = "stranger/model--own.OwnModel"
    (own / "config.json").write_text(json.dumps(settings))
    refused(lambda: load_model(str(own), trust_remote_code=str(own)), evil, "lies with stranger/model, which is not tr")


@pytest.mark.parametrize("trust", [True, False, "true", "False"])
def test_trust_is_no_yes_or_no(trust: Any) -> None:
    with pytest.raises(UserError, match=f"model.trust_remote_code is {trust}, but takes the name of the model"):
        PreferenceModule("owner/model", trust_remote_code=trust)


def test_trust_is_in_the_model_that_is_loaded() -> None:
    with pytest.raises(UserError, match="trust_remote_code is 'owner/a', but the model is 'owner/b': give that name"):
        PreferenceModule("owner/b", trust_remote_code="owner/a")
    PreferenceModule("owner/a", trust_remote_code="owner/a")


def test_an_adapters_base_may_be_trusted(own: Path, tmp_path: Path, tiny_tokenizer: Any, evil: Evil) -> None:
    adapter = tmp_path / "adapter"
    save_policy(load_policy("tiny", lora_rank=2), tiny_tokenizer, adapter, "adapter", torch.arange(9)[None])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(own)}))
    refused(lambda: load_model(str(adapter)), evil, "needs code of its own")
    PreferenceModule(str(adapter), trust_remote_code=str(own)).configure_model()
    assert evil.mark.exists()
