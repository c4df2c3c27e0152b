"""The card of an adapter as HTML: lineage, samples, and what cannot be shown."""

import pytest

from lora_tuner.adapters.adapter import METRICS_FILE, load_adapter_folder
from lora_tuner.adapters.samples import SAMPLES_FILE, Sample, write_samples
from lora_tuner.server.playground import library_html
from lora_tuner.server.service import ServedModel

from ... import adapter_files


@pytest.fixture
def adapters(tmp_path):
    """Replaces those of conftest.py, which are trained."""
    return tmp_path / "adapters"


@pytest.fixture
def make(tmp_path):
    """Return a function that writes an adapter with parents, and lists it; the value makes its weights."""

    def make(name, value, *parents):
        infos = [parent.adapter.parent_info() for parent in parents]
        facts = adapter_files.manifest(parents=infos, result=None)
        path = adapter_files.write(tmp_path / name, weights=adapter_files.tensors(value=value), facts=facts)
        return ServedModel(name, path, load_adapter_folder(path))

    return make


def show(model, models=()):
    return library_html.card(model, model.adapter, models, lambda text: text.replace("/home/me/", ""))


def items(html):
    """Return the names in the lineage, those with a link with a star."""
    _, _, lineage = html.partition('<div class="lineage">')
    lines = [line.partition("<")[0] for line in lineage.partition("</div>")[0].split("<li>")[1:]]
    links = [part.partition('"')[0] for part in lineage.split('data-name="')[1:]]
    return [line for line in lines if line], links


def test_lineage_links_relatives_both_ways(make):
    one, other = make("one", 1.0), make("other", 2.0)
    blend = make("blend", 3.0, one, other)
    grandchild = make("grandchild", 4.0, blend)
    models = [one, blend, grandchild]
    assert items(show(blend, models)) == (["other "], ["one", "grandchild"])
    assert "not in this library" in show(blend, models)
    assert items(show(one, models)) == ([], ["blend", "grandchild"])
    assert items(show(grandchild, models)) == (["other "], ["blend", "one"])
    assert items(show(other, models)) == ([], ["blend", "grandchild"])
    assert "Lineage" not in show(other, [other])


def test_lineage_names_renamed_parent(make):
    parent = make("before", 1.0)
    child = make("child", 2.0, parent)
    renamed = make("after", 1.0)
    html = show(child, [child, renamed])
    assert items(html) == ([], ["after"])
    assert "was before" in html


def test_lineage_in_a_circle_ends(make, tmp_path):
    one = make("one", 1.0)
    two = make("two", 2.0, one)
    facts = adapter_files.manifest(parents=[two.adapter.parent_info()])
    adapter_files.write(tmp_path / "one", facts=facts)
    one = ServedModel("one", one.path, load_adapter_folder(one.path))
    assert items(show(one, [one, two])) == ([], ["two", "one", "two"])


def test_samples_are_shown_by_step(make):
    model = make("poems", 1.0)
    samples = [
        Sample(step=step, prompt="A <b>", base="base text", adapter=f"text {step}") for step in (20, 0, 10)
    ]
    write_samples(samples, model.path / SAMPLES_FILE)
    html = show(ServedModel("poems", model.path, load_adapter_folder(model.path)))
    assert "A &lt;b&gt;" in html
    assert html.count("base text") == 1
    assert html.index("text 20") < html.index("text 10") < html.index("text 0")


def test_damaged_files_are_named_in_place(make):
    model = make("poems", 1.0)
    (model.path / SAMPLES_FILE).write_text("no sample\n")
    (model.path / METRICS_FILE).write_text('{"step": 1, "loss": "<img>"}\n')
    html = show(model)
    assert "has a line that is no sample" in html
    assert "has no loss curve: could not convert string to float: &#39;&lt;img&gt;&#39;" in html


def test_loss_curve_ends_at_held_out_loss(make, tmp_path):
    facts = adapter_files.manifest()
    path = adapter_files.write(tmp_path / "poems", facts=facts)
    (path / METRICS_FILE).write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.9}\n')
    html = show(ServedModel("poems", path, load_adapter_folder(path)))
    assert "held out: 3.5;" in html
    assert "base: 3.75" in html
    assert 'download="poems-loss.csv"' in html
