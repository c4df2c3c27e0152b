"""manifest.json: what it holds, older and invalid ones."""

import json

import pytest

from lora_tuner import atomic_io
from lora_tuner.adapters.adapter import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
)
from lora_tuner.adapters.manifest import Manifest, ParentInfo, WeightsInfo, utc_timestamp

from .. import adapter_files
from .test_adapter import refusal


def test_manifest_round_trip(tmp_path):
    manifest = adapter_files.manifest()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert load_adapter_folder(
        adapter_files.write(tmp_path / "a", facts=manifest)
    ).manifest == manifest.model_copy(
        update={
            "weights": WeightsInfo(
                sha256=atomic_io.sha256_file(tmp_path / "a" / WEIGHTS_FILE),
                bytes=(tmp_path / "a" / WEIGHTS_FILE).stat().st_size,
                parameters=192,
            )
        }
    )


def test_utc_timestamp_format():
    assert len(utc_timestamp()) == len("2025-01-02T03:04:05+00:00")
    assert utc_timestamp().endswith("+00:00")


@pytest.mark.parametrize("digest", ["../../secret", "/etc/passwd", "AB" * 32, "ab" * 31])
def test_manifest_invalid_hash_is_rejected(tmp_path, digest):
    """The hash becomes a file name in the cache."""
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["data"]["held_out_hash"] = digest
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder).startswith(f"a/{MANIFEST_FILE}: data.held_out_hash: String should match pattern")


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_manifest_non_finite_number_is_rejected(tmp_path, figure):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["result"]["gain"] = figure
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder) == f"a/{MANIFEST_FILE}: result.gain: Input should be a finite number."


def test_old_manifest_without_parents_loads(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["parents"], manifest["data"]["eval_dataset"], manifest["general"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    adapter = load_adapter_folder(folder)
    assert adapter.manifest.parents == []
    assert adapter.manifest.data.eval_dataset is None
    assert adapter.manifest.result.gain == 0.25
    assert adapter.parent_info() == ParentInfo(name="a", sha256=atomic_io.sha256_file(folder / WEIGHTS_FILE))


def test_sha256_comes_from_manifest(tmp_path):
    known = WeightsInfo(sha256="ab" * 32, bytes=1, parameters=1)
    assert (
        load_adapter_folder(
            adapter_files.write(tmp_path / "a", facts=adapter_files.manifest(weights=known))
        ).sha256
        == "ab" * 32
    )
    bare = adapter_files.write(tmp_path / "b")
    assert load_adapter_folder(bare).sha256 == atomic_io.sha256_file(bare / WEIGHTS_FILE)


def test_parent_info_includes_ancestors(tmp_path):
    bare = load_adapter_folder(adapter_files.write(tmp_path / "bare"))
    assert bare.parent_info() == ParentInfo(
        name="bare", sha256=atomic_io.sha256_file(tmp_path / "bare" / WEIGHTS_FILE)
    )
    child = load_adapter_folder(
        adapter_files.write(tmp_path / "child", facts=adapter_files.manifest(parents=[bare.parent_info()]))
    )
    assert child.parent_info().parents == [bare.parent_info()]
    assert json.loads(json.dumps(child.to_dict()))["parents"] == [
        {"name": "bare", "sha256": bare.sha256, "parents": []}
    ]


@pytest.mark.parametrize(
    "parent", [{"name": "a"}, {"name": "a", "sha256": 1}, {"name": "a", "sha256": "b" * 64, "age": 3}]
)
def test_manifest_invalid_parents_are_rejected(tmp_path, parent):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text()) | {
        "parents": [{"name": "x", "sha256": "c" * 64, "parents": [parent]}]
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder).startswith(f"a/{MANIFEST_FILE}: parents.0.parents.0.")


def test_manifest_error_lists_all_problems(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["base"]["fingerprint"]
    manifest |= {"schema_version": 3, "extra": 1}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder) == (
        f"a/{MANIFEST_FILE}: schema_version: Input should be less than or equal to 2; base.fingerprint: Field required; "
        "extra: Extra inputs are not permitted."
    )
    (folder / MANIFEST_FILE).write_text("[]")
    assert (
        refusal(folder)
        == f"a/{MANIFEST_FILE}: manifest: Input should be a valid dictionary or instance of Manifest."
    )
    (folder / MANIFEST_FILE).write_text("")
    assert (
        refusal(folder)
        == f"a/{MANIFEST_FILE} is not readable as JSON: Expecting value: line 1 column 1 (char 0)."
    )
    (folder / MANIFEST_FILE).write_text(" " * 10_000_001)
    assert refusal(folder) == f"a/{MANIFEST_FILE} is too large: at most 1,000,000 bytes are read."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"names": ["a"], "counts": [1]}, "labels.names: List should have at least 2 items"),
        ({"names": ["a", "a"]}, "labels: Value error, names are different, and each has a count"),
        ({"names": ["a", ""]}, "labels.names.1: String should have at least 1 character"),
        ({"names": ["a", "x" * 201]}, "labels.names.1: String should have at most 200 characters"),
        ({"counts": [1]}, "labels: Value error, names are different, and each has a count"),
        ({"temperature": 1e-300}, "labels.temperature: Input should be greater than or equal to 0.01"),
        ({"max_length": 1}, "labels.max_length: Input should be greater than or equal to 2"),
    ],
)
def test_invalid_labels_are_rejected(tmp_path, changes, problem):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["labels"] = adapter_files.labels().model_dump(mode="json") | changes
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder).startswith(f"a/{MANIFEST_FILE}: {problem}")
