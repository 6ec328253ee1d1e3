"""What the README shows, works."""

import re
from pathlib import Path

from semiopen.vendor.keys import generate_keys

ROOT = Path(__file__).parent.parent


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "lab").symlink_to(ROOT / "lab")
    monkeypatch.chdir(tmp_path)
    generate_keys(tmp_path / "keys")
    names = {}
    exec(code, names)
    assert "Once upon a time" in capsys.readouterr().out
    assert names["tuned"].get_nb_trainable_parameters()[0] > 0
    names["model"].enclave.close()


def test_every_linked_file_is_there():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("lab/**/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_every_command_is_in_the_readme():
    from semiopen.cli import app

    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.callback.__name__
        assert f"semiopen {name}" in readme or name in ("generate",), name
