"""Every row of the failure table, with real distributions on a path that holds nothing else."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest

from flexheads import plugins
from flexheads.errors import ConflictError, PluginError, PluginWarning, UnknownNameError
from flexheads.plugins import Provider, load_registry, resolve

STRICT = {"FLEXHEADS_STRICT_PLUGINS": "1"}
ARCHITECTURE = """
@hookimpl
def flexheads_register_architectures():
    return [ArchitectureSpec(name={0!r}, model_types=({1!r},), backbone={2!r}, layers=())]
"""
HEAD_TYPE = """
@hookimpl
def flexheads_register_head_types():
    return [HeadTypeSpec(name={0!r}, head="acme:Head")]
"""
METHOD = """
@hookimpl
def flexheads_register_adapter_methods():
    identifiers = {{{1!r}: ("acme:Config", {{"scale": 2}})}}
    yield AdapterMethodSpec(
        name={0!r}, method="acme:M", config="acme:C", identifiers=identifiers, tag={2!r}
    )
"""
CONVERSION = """
@hookimpl
def flexheads_register_conversions():
    return [HeadConversion(architecture={0!r}, static_class={1!r}, heads=())]
"""
FORMAT = """
@hookimpl
def flexheads_register_checkpoint_formats():
    return [CheckpointFormat(name={0!r}, format="acme:Format")]
"""


class Site:
    """A folder on ``sys.path`` that fake distributions are installed into."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = []

    def module(self, name, code):
        """Write a module with the contract's names imported."""
        header = "from flexheads.hookspecs import hookimpl\nfrom flexheads.specs import *\n"
        (self.folder / f"{name}.py").write_text(header + code, encoding="utf-8")
        self.modules.append(name)
        importlib.invalidate_caches()
        return name

    def dist(self, name, version, requires=(), entry_points=""):
        """Write a ``.dist-info`` folder as an installer does."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        importlib.invalidate_caches()

    def plugin(self, name, code, *, dist=None, version="1.0", requires=()):
        """Install a distribution with one plugin in one module."""
        dist = dist or f"flexheads-{name}"
        module = self.module(f"fake_{dist.replace('-', '_')}", code)
        self.dist(dist, version, requires, f"[flexheads]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    # Not syspath_prepend: its undo would write the shortened path into the real one.
    path = [entry for entry in sys.path if "site-packages" not in entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *path])
    fakes = Site(tmp_path)
    yield fakes
    for name in fakes.modules:
        sys.modules.pop(name, None)


def load(**environ):
    return load_registry(environ=environ, builtins=())


# What is found


def test_a_plugin_is_found_and_known_by_its_provider(site):
    site.plugin("acme", HEAD_TYPE.format("crf"), version="1.2")
    found = load()
    spec = found.head_type("crf")
    provider = Provider("acme", "flexheads-acme", "1.2", "fake_flexheads_acme")
    assert found.provider_of(spec) == provider
    assert str(provider) == "plugin 'acme' of flexheads-acme 1.2"
    assert found.head_types == {"crf": spec}
    assert found.skipped == ()


def test_every_lookup_answers(site):
    site.plugin("a", ARCHITECTURE.format("acme", "acme_text", "acme.modeling:AcmeModel"))
    site.plugin("b", METHOD.format("shift", "tiny_shift", "shift-tag"))
    site.plugin("c", CONVERSION.format("acme", "AcmeForTagging") + FORMAT.format("files"))
    found = load()
    architecture = found.architectures["acme"]
    method = found.methods["shift"]
    assert found.architecture("acme") is architecture
    assert found.architecture_for("acme_text") is architecture
    assert found.with_heads("AcmeModelWithHeads") is architecture
    assert found.method("shift") is found.method_for_tag("shift-tag") is method
    assert found.identifier("tiny_shift") == (method, "acme:Config", {"scale": 2})
    assert found.conversions_for("acme") == (found.conversion("AcmeForTagging"),)
    assert found.conversions_for("other") == ()
    assert found.format("files") is found.formats["files"]


def test_a_registry_cannot_be_changed(site):
    site.plugin("acme", HEAD_TYPE.format("crf"))
    found = load()
    with pytest.raises(FrozenInstanceError):
        found.skipped = ()
    for mapping in (found.head_types, found.claims):
        with pytest.raises(TypeError):
            mapping["x"] = None


def test_an_optional_hook_of_a_newer_core_is_let_through(site):
    later = "\n@hookimpl(optionalhook=True)\ndef flexheads_register_later(): return []\n"
    site.plugin("acme", HEAD_TYPE.format("crf") + later)
    assert list(load().head_types) == ["crf"]


# Conflicts


def test_two_distributions_with_one_plugin_name_are_an_error(site):
    site.plugin("acme", HEAD_TYPE.format("a"), version="1.2")
    site.plugin("acme", HEAD_TYPE.format("b"), dist="acme-fork", version="3.4")
    with pytest.raises(ConflictError) as caught:
        load()
    text = str(caught.value)
    assert "plugin name 'acme'" in text
    assert "flexheads-acme 1.2" in text
    assert "acme-fork 3.4" in text
    assert "pip uninstall acme-fork or pip uninstall flexheads-acme" in text
    assert "FLEXHEADS_DISABLE_PLUGINS=acme" in text


@pytest.mark.parametrize(
    ("one", "two", "claim"),
    [
        (
            ARCHITECTURE.format("x", "a", "m:A"),
            ARCHITECTURE.format("x", "b", "m:B"),
            "architecture 'x'",
        ),
        (
            ARCHITECTURE.format("a", "x", "m:A"),
            ARCHITECTURE.format("b", "x", "m:B"),
            "model type 'x'",
        ),
        (
            ARCHITECTURE.format("a", "a", "m:X"),
            ARCHITECTURE.format("b", "b", "n:X"),
            "class with heads 'XWithHeads'",
        ),
        (HEAD_TYPE.format("x"), HEAD_TYPE.format("x"), "head type 'x'"),
        (METHOD.format("x", "a", "a"), METHOD.format("x", "b", "b"), "adapter method 'x'"),
        (METHOD.format("a", "x", "a"), METHOD.format("b", "x", "b"), "adapter identifier 'x'"),
        (METHOD.format("a", "a", "x"), METHOD.format("b", "b", "x"), "adapter method tag 'x'"),
        (CONVERSION.format("a", "X"), CONVERSION.format("b", "X"), "conversion 'X'"),
        (FORMAT.format("x"), FORMAT.format("x"), "format 'x'"),
    ],
)
def test_two_plugins_with_one_name_are_an_error(site, one, two, claim):
    site.plugin("one", one, version="1.2")
    site.plugin("two", two, version="3.4")
    with pytest.raises(ConflictError) as caught:
        load()
    text = str(caught.value)
    assert f"- {claim}: " in text
    assert "plugin 'one' of flexheads-one 1.2 and plugin 'two' of flexheads-two 3.4" in text
    assert "FLEXHEADS_DISABLE_PLUGINS=one or FLEXHEADS_DISABLE_PLUGINS=two" in text


def test_one_error_holds_all_conflicts(site):
    site.plugin("a", HEAD_TYPE.format("x"))
    site.plugin("b", HEAD_TYPE.format("x") + FORMAT.format("y"))
    site.plugin("c", FORMAT.format("y"))
    site.plugin("d", "")
    site.plugin("d", "", dist="other-d")
    with pytest.raises(ConflictError) as caught:
        load()
    for claim in ("head type 'x'", "format 'y'", "plugin name 'd'"):
        assert claim in str(caught.value)


def test_a_plugin_cannot_replace_a_built_in_and_only_the_plugin_can_go(site):
    core = site.module("fake_core", HEAD_TYPE.format("x"))
    site.plugin("acme", HEAD_TYPE.format("x"))
    with pytest.raises(ConflictError, match="head type 'x'") as caught:
        load_registry(environ={}, builtins=[core])
    assert "pip uninstall flexheads-acme, or set FLEXHEADS_DISABLE_PLUGINS=acme." in str(
        caught.value
    )


def test_a_conflict_ends_when_one_side_is_disabled(site):
    site.plugin("one", HEAD_TYPE.format("x"))
    site.plugin("two", HEAD_TYPE.format("x"))
    found = load(FLEXHEADS_DISABLE_PLUGINS="one")
    assert found.provider_of(found.head_type("x")).plugin == "two"


# Plugins that fail

BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def", "SyntaxError"),
    "no hook": ("x = 1", "needs @flexheads.hookimpl on at least one function"),
    "not marked": (
        FORMAT.format("f").replace("@hookimpl", ""),
        "needs @flexheads.hookimpl on ['flexheads_register_checkpoint_formats']",
    ),
    "misspelled": (
        HEAD_TYPE.format("x").replace("head_types", "head_typs"),
        "'flexheads_register_head_typs'",
    ),
    "argument": (HEAD_TYPE.format("x").replace("types():", "types(config):"), "Argument(s)"),
    "half-way": (
        "@hookimpl\ndef flexheads_register_head_types():\n"
        "    yield HeadTypeSpec(name='x', head='a:B')\n    raise KeyError('boom')",
        "flexheads_register_head_types raised KeyError: 'boom'",
    ),
    "exit in hook": (
        "@hookimpl\ndef flexheads_register_head_types(): raise SystemExit",
        "flexheads_register_head_types raised SystemExit",
    ),
    "none": ("@hookimpl\ndef flexheads_register_head_types(): pass", "'NoneType'"),
    "not a list": (HEAD_TYPE.format("x").replace("[", "").replace("]", ""), "not iterable"),
    "wrong type": (HEAD_TYPE.format("x").replace("head_types", "conversions"), "HeadConversion"),
    "a string": ("@hookimpl\ndef flexheads_register_head_types(): return 'x'", "HeadTypeSpec"),
    "name": (HEAD_TYPE.format(7), "head type 7 is not a name"),
    "no name": (HEAD_TYPE.format(""), "head type '' is not a name"),
    "unhashable name": (HEAD_TYPE.format(["x"]), "unhashable"),
    "twice": (HEAD_TYPE.format("x").replace("]", "] * 2"), "head type 'x' is registered twice"),
    "reference": (HEAD_TYPE.format("x").replace("acme:", "acme."), "'acme.Head' is not"),
    "class": (HEAD_TYPE.format("x").replace('"acme:Head"', "int"), "<class 'int'> is not"),
    "config": (METHOD.format("x", "x", "x").replace("acme:Config", "acme"), "'acme' is not"),
    "identifiers": (
        METHOD.format("x", "x", "x").replace('("acme:Config", {"scale": 2})', "'acme:Config'"),
        "ValueError",
    ),
    "model_types": (
        ARCHITECTURE.format("x", "x", "a:B").replace(",)", ")"),
        "model_types is not a tuple",
    ),
    "registry": (
        "from flexheads.plugins import registry\n"
        "@hookimpl\ndef flexheads_register_formats(): pass\nregistry()",
        "asked for while it loads",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_nothing_of_it_stays(site, case):
    code, cause = BROKEN[case]
    # A good hook beside the bad one: it must not be registered either.
    good = FORMAT.format("half") if "checkpoint_formats" not in code else HEAD_TYPE.format("half")
    site.plugin("bad", code if case == "no hook" else f"{good}\n{code}", version="1.2")
    site.plugin("good", FORMAT.format("whole"))
    with pytest.warns(PluginWarning) as caught:
        found = load()
    [text] = [str(warning.message) for warning in caught]
    assert text.startswith("plugin 'bad' of flexheads-bad 1.2 (fake_flexheads_bad)")
    assert cause in text
    assert {name for _, name in found.claims} == {"whole"}
    [skipped] = found.skipped
    assert skipped.provider.plugin == "bad"
    assert cause in skipped.reason


@pytest.mark.parametrize("case", BROKEN)
def test_strict_turns_a_broken_plugin_into_an_error(site, case):
    code, cause = BROKEN[case]
    site.plugin("bad", code, version="1.2")
    with pytest.raises(PluginError) as caught:
        load(**STRICT)
    assert "plugin 'bad' of flexheads-bad 1.2 (fake_flexheads_bad)" in str(caught.value)
    assert cause in str(caught.value)
    assert caught.value.__cause__ is not None


def test_strict_names_all_broken_plugins_at_once(site):
    site.plugin("one", "import nothing_1")
    site.plugin("two", "import nothing_2")
    with pytest.raises(PluginError, match=r"(?s)nothing_1.*nothing_2"):
        load(**STRICT)


def test_strict_zero_is_not_strict(site):
    site.plugin("bad", "import nothing")
    with pytest.warns(PluginWarning, match="nothing"):
        load(FLEXHEADS_STRICT_PLUGINS="0")


def test_an_entry_point_that_names_nothing_is_blamed(site):
    site.dist("flexheads-bad", "1.2", entry_points="[flexheads]\nbad = !!\nworse = a.b:c d\n")
    with pytest.warns(PluginWarning) as caught:
        load()
    assert [str(w.message)[:37] for w in caught] == [
        "plugin 'bad' of flexheads-bad 1.2 (!!",
        "plugin 'worse' of flexheads-bad 1.2 (",
    ]


def test_a_broken_built_in_is_always_an_error(site):
    core = site.module("fake_core", "import nothing")
    with pytest.raises(PluginError, match=r"fake_core.*nothing"):
        load_registry(environ={}, builtins=[core])
    with pytest.raises(PluginError, match="no_such_part"):
        load_registry(
            environ={"FLEXHEADS_DISABLE_PLUGINS": "no_such_part"}, builtins=["no_such_part"]
        )


# Requirements


@pytest.mark.parametrize(
    ("requirement", "required", "installed"),
    [
        ("flexheads>=2", "flexheads>=2", "1.5"),
        ("flexheads<1.5,>=1", "flexheads<1.5,>=1", "1.5"),
        ("Flexheads[all] >=2 ; python_version > '3'", "flexheads>=2", "1.5"),
        ("transformers (<5)", "transformers<5", "5.10.0"),
    ],
)
def test_an_unmet_requirement_is_named_with_both_versions(site, requirement, required, installed):
    site.dist("flexheads", "1.5")
    site.dist("transformers", "5.10.0")
    site.plugin("acme", HEAD_TYPE.format("x"), version="0.3", requires=["numpy", requirement])
    with pytest.warns(PluginWarning, match="plugin 'acme' of flexheads-acme 0.3") as caught:
        found = load()
    assert f"it requires {required}; installed is {installed}" in str(caught[0].message)
    assert found.head_types == {}
    assert "fake_flexheads_acme" not in sys.modules
    with pytest.raises(PluginError, match=installed):
        load(**STRICT)


def test_all_unmet_requirements_are_in_one_message(site):
    site.dist("flexheads", "1.5")
    site.plugin("acme", HEAD_TYPE.format("x"), requires=["flexheads>=2", "transformers>=4"])
    with pytest.warns(PluginWarning, match=r"installed is 1\.5; .* installed is none"):
        load()


@pytest.mark.parametrize(
    "requirement",
    [
        "flexheads>=1.5",
        "flexheads",
        "flexheads>=9; python_version < '3'",
        "flexheads>=9; extra == 'new'",
        "transformers>=5",  # a pre-release is newer than the release before it
        "torch>=99",  # pip's business, not ours
    ],
)
def test_a_met_marked_off_extra_or_foreign_requirement_is_no_obstacle(site, requirement):
    site.dist("flexheads", "1.5")
    site.dist("transformers", "5.1.0.dev0")
    site.plugin("acme", HEAD_TYPE.format("x"), requires=[requirement])
    assert list(load().head_types) == ["x"]


def test_a_core_without_metadata_meets_every_requirement(site):
    core = site.module("fake_core", FORMAT.format("f"))
    site.plugin("acme", HEAD_TYPE.format("x"), requires=["flexheads>=9"])
    found = load_registry(environ={}, builtins=[core])
    assert found.provider_of(found.format("f")).version == "0+unknown"
    assert list(found.head_types) == ["x"]


def test_a_requirement_that_cannot_be_read_is_blamed(site):
    site.plugin("acme", HEAD_TYPE.format("x"), requires=["flexheads >>> 1"])
    with pytest.warns(PluginWarning, match="plugin 'acme'.*InvalidRequirement"):
        load()


# Unknown names


def test_an_unknown_name_lists_the_known_and_the_nearest(site):
    site.plugin("acme", HEAD_TYPE.format("tagging"))
    with pytest.raises(UnknownNameError) as caught:
        load().head_type("taging")
    assert str(caught.value) == (
        "There is no head type named 'taging'. Known: 'tagging'. Did you mean 'tagging'?"
    )


@pytest.mark.parametrize(
    "lookup",
    [
        "architecture",
        "architecture_for",
        "with_heads",
        "head_type",
        "method",
        "method_for_tag",
        "identifier",
        "conversion",
        "format",
    ],
)
def test_an_unknown_name_from_a_file_leads_to_the_distribution_that_wrote_it(site, lookup):
    with pytest.raises(UnknownNameError, match="'nope'") as caught:
        getattr(load(), lookup)("nope", provider="flexheads-crf==0.3")
    assert "pip install --upgrade flexheads-crf==0.3." in str(caught.value)


@pytest.mark.parametrize(
    "provider", ["x; rm -rf ~", "x @ https://evil.example", "-r x", "a\nb", ""]
)
def test_a_files_word_never_becomes_more_than_a_package_name(site, provider):
    with pytest.raises(UnknownNameError) as caught:
        load().head_type("nope", provider)
    assert "pip install" not in str(caught.value)


def test_an_unknown_name_says_which_plugins_were_not_loaded(site):
    site.plugin("acme", HEAD_TYPE.format("crf"), version="1.2")
    found = load(FLEXHEADS_DISABLE_PLUGINS="acme")
    with pytest.raises(UnknownNameError, match=r"'acme' of flexheads-acme 1\.2: disabled by"):
        found.head_type("crf")


def test_an_unknown_model_type_leads_to_a_package(site):
    with pytest.raises(UnknownNameError) as caught:
        load().architecture_for("acme_text")
    text = str(caught.value)
    assert "pip install flexheads-acme-text (a guess) or pip install 'flexheads[all]'" in text
    assert "`flexheads plugins` lists what is installed" in text


def test_an_odd_model_type_is_not_made_a_command(site):
    with pytest.raises(UnknownNameError, match="Try pip install 'flexheads") as caught:
        load().architecture_for("x; rm -rf ~")
    assert "(a guess)" not in str(caught.value)


# Disabling


def test_disabled_plugins_are_not_even_imported(site):
    site.plugin("a", "raise RuntimeError")
    site.plugin("b", "raise RuntimeError")
    site.plugin("c", HEAD_TYPE.format("crf"))
    found = load(FLEXHEADS_DISABLE_PLUGINS=" a ,b,not-installed, ", **STRICT)
    assert list(found.head_types) == ["crf"]
    assert [(s.provider.plugin, s.reason) for s in found.skipped] == [
        ("a", "disabled by FLEXHEADS_DISABLE_PLUGINS"),
        ("b", "disabled by FLEXHEADS_DISABLE_PLUGINS"),
    ]


def test_the_variables_are_read_from_the_environment(site, monkeypatch):
    site.plugin("a", "raise RuntimeError")
    monkeypatch.setenv("FLEXHEADS_DISABLE_PLUGINS", "a")
    assert load_registry(builtins=()).skipped[0].provider.plugin == "a"


# The one registry of the process


def test_threads_share_one_registry_that_is_loaded_once(site, monkeypatch):
    calls = []

    def slow():
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return load_registry(environ={}, builtins=())

    monkeypatch.setattr(plugins, "_load_once", functools.cache(slow))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: plugins.registry(), range(16)))
    assert len(calls) == 1
    assert all(each is found[0] for each in found)


def test_a_hook_that_asks_for_the_registry_is_blamed(site):
    code = "from flexheads.plugins import registry\n" + HEAD_TYPE.format("x")
    site.plugin("acme", code.replace("return", "registry(); return"))
    with pytest.warns(PluginWarning, match="plugin 'acme'.*asked for while it loads"):
        load()
    site.plugin("fine", HEAD_TYPE.format("y"))
    assert list(load(FLEXHEADS_DISABLE_PLUGINS="acme").head_types) == ["y"]


# References


def test_a_reference_is_imported():
    assert resolve("collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize("reference", ["os", "os.path", ":x", "os:", "os:path.join", "a b:c", ""])
def test_a_reference_of_another_shape_is_refused(reference):
    with pytest.raises(PluginError, match="'module:attr'"):
        resolve(reference)


@pytest.mark.parametrize("head", ["no_such_module:Head", "fake_flexheads_acme:Missing"])
def test_a_reference_that_fails_blames_who_registered_it(site, monkeypatch, head):
    site.plugin("acme", HEAD_TYPE.format("x").replace("acme:Head", head), version="1.2")
    monkeypatch.setattr(plugins, "_load_once", load)
    with pytest.raises(PluginError) as caught:
        resolve(head)
    assert f"{head!r}, named by plugin 'acme' of flexheads-acme 1.2," in str(caught.value)
    assert isinstance(caught.value.__cause__, (ImportError, AttributeError))


def test_the_cores_own_plugins_load_without_torch_or_transformers():
    code = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.entry_points = lambda **_: ()\n"
        "from flexheads.plugins import load_registry\n"
        "found = load_registry()\n"
        "assert found.methods and found.head_types and found.formats\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
