"""What the pages promise: commands parse, tables name real functions, numbers stand in a table.

And what the sources promise to their readers: shared blocks are the same to the byte, every flag is
read, no line is wider than 100 columns, and importing a script changes nothing.
"""
import glob
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
import torchvision

import barlow_sparsehead
import byol_gessl
import common
import eval_linear
import mae_tc2
import simclr_tc2
from conftest import ROOT

SCRIPTS = {"simclr_tc2": simclr_tc2, "byol_gessl": byol_gessl,
           "barlow_sparsehead": barlow_sparsehead, "mae_tc2": mae_tc2}
PAGES = {"tc2": "simclr_tc2", "gessl": "byol_gessl", "sparsehead": "barlow_sparsehead",
         "mae": "mae_tc2"}


def read(name):
    with open(f"{ROOT}/{name}") as file:
        return file.read()


def sources():
    """Names of all Python files of the project."""
    found = []
    for pattern in ("*.py", "tests/*.py", "results/*.py"):
        found += sorted(glob.glob(pattern, root_dir=ROOT))
    return found


def pages():
    return ["README.md", *sorted(glob.glob("results/*.md", root_dir=ROOT))]


def joined_commands(text):
    """Lines of `text`; a command that ends in a backslash goes on in the next line."""
    return text.replace("\\\n", " ").splitlines()


# ---- the sources ---------------------------------------------------------------------------------
def test_shared_blocks_are_identical_in_all_scripts():
    blocks = {}
    for name in SCRIPTS:
        text = read(f"{name}.py")
        found = re.findall(r"^ *# -- shared: (\w+) --\n(.*?)^ *# -- end shared --$", text,
                           re.S | re.M)
        assert len(found) == text.count("# -- shared: ") == text.count("# -- end shared --")
        for block, content in found:
            assert blocks.setdefault(block, content) == content, f"{block} differs in {name}.py"
    assert blocks.keys() == {"main", "tc2"}


@pytest.mark.parametrize("name", [*SCRIPTS, "eval_linear"])
def test_every_flag_is_read(name):
    module = __import__(name)
    argv = ["run"] if name == "eval_linear" else []
    text = read(f"{name}.py") + read("common.py")
    for flag in vars(module.parse_args(argv)):
        # A use that is not an assignment.
        assert re.search(rf"\bargs\.{flag}\b(?!\s*=[^=])", text), f"--{flag} is never read"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_at_most_ten_flags_of_its_own_and_says_what_they_do(name):
    module = SCRIPTS[name]
    parser = common.base_parser("", module.RECIPES, ())
    shared = {action.dest for action in parser._actions}
    own = set(vars(module.parse_args([]))) - shared
    assert 0 < len(own) <= 10
    lines = inspect.getsource(module.parse_args)
    assert lines.count("help=") == lines.count("add(")


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_scripts_share_flags_names_and_order(name):
    parser = common.base_parser("", simclr_tc2.RECIPES, ())
    common_flags = [action.dest for action in parser._actions if action.dest != "help"]
    found = list(vars(SCRIPTS[name].parse_args([])))
    assert found[:len(common_flags)] == common_flags


def test_no_line_is_wider_than_100_columns():
    for name in sources():
        for number, line in enumerate(read(name).splitlines(), 1):
            assert len(line) <= 100, f"{name}:{number} has {len(line)} columns"


def test_prose_wraps_at_100_columns_and_the_readme_is_a_page():
    for name in pages():
        for number, line in enumerate(read(name).splitlines(), 1):
            table_or_link = line.startswith(("|", "!["))
            assert len(line) <= 100 or table_or_link, f"{name}:{number} has {len(line)} columns"
    assert len(read("README.md").split()) <= 2000


def test_every_name_of_common_serves_at_least_two_files():
    """What one file alone needs lives in that file."""
    text = read("common.py")
    names = re.findall(r"^(?:def|class) (\w+)", text, re.M)
    names.remove("gather_batch")        # any contrastive loss on several processes needs it
    users = [*SCRIPTS, "eval_linear"]
    for name in names:
        using = [user for user in users if re.search(rf"\b{name}\b", read(f"{user}.py"))]
        inside = len(re.findall(rf"\b{name}\b", text)) > 1
        assert len(using) != 1 or inside, f"{name} is needed by {using[0]}.py alone"
        assert using or inside, f"{name} is needed by nobody"


def test_importing_changes_nothing(tmp_path):
    code = f"""
import os, sys, torch
sys.path.insert(0, {ROOT!r})
state, threads = torch.random.get_rng_state(), torch.get_num_threads()
for name in {[*SCRIPTS, "common", "eval_linear"]!r}:
    __import__(name)
    assert torch.equal(state, torch.random.get_rng_state()), name
    assert threads == torch.get_num_threads(), name
    assert "matplotlib" not in sys.modules, name
assert not os.listdir()
"""
    found = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_a_script_and_common_run_elsewhere(tmp_path):
    """Copied to another folder, two files are enough; with eval_linear.py, three."""
    for name in ("barlow_sparsehead.py", "common.py", "eval_linear.py"):
        (tmp_path / name).write_text(read(name))
    code = ("import barlow_sparsehead; barlow_sparsehead.main('--data fake --arch resnet_tiny "
            "--max-steps 1 --out run --device cpu'.split()); import eval_linear; "
            "eval_linear.main('run --protocol knn --device cpu'.split())")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                           text=True)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "eval.json").exists()


# ---- equations -----------------------------------------------------------------------------------
def tagged(module):
    """{name: source} of the functions and classes of `module` that carry an equation's tag."""
    found = {}
    for name, member in vars(module).items():
        own = getattr(member, "__module__", None) == module.__name__
        if own and (inspect.isfunction(member) or inspect.isclass(member)):
            text = inspect.getsource(member)
            if re.search(r"\[(SimCLR|TC2|BYOL|GeSSL|Barlow Twins|SparseHead|MAE) ", text):
                found[name] = text
    return found


def equation_table(page):
    """[(tag, function)] of a page's lines like `| [TC2 Eq. 1] | `factor_loss` | ...`."""
    return re.findall(r"^\| \[([^\]]+)\] \| `(\w+)`", read(f"results/{page}.md"), re.M)


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_equations_names_functions_that_carry_the_tag(page):
    module = SCRIPTS[PAGES[page]]
    table = equation_table(page)
    assert len(table) >= 5
    functions = tagged(module)
    for tag, name in table:
        assert f"[{tag}" in functions[name], f"{name} has no tag [{tag}]"


@pytest.mark.parametrize("page", PAGES)
def test_every_tagged_function_stands_in_a_table(page):
    listed = {name for other in PAGES for _, name in equation_table(other)}
    missing = tagged(SCRIPTS[PAGES[page]]).keys() - listed
    assert not missing


# ---- commands and numbers ------------------------------------------------------------------------
def commands():
    """[(page, script, flags)] of every command line of the pages and the scripts' docstrings."""
    found = []
    for name in [*pages(), *(f"{script}.py" for script in SCRIPTS)]:
        for line in joined_commands(read(name)):
            match = re.match(r" *(?:python|(?:srun )?torchrun [^#]*?) (\w+)\.py\b([^#|`&]*)", line)
            if match and match[1] in {*SCRIPTS, "eval_linear"}:
                flags = re.split(r" {2,}", match[2])[0]         # what follows is a remark
                found.append((name, match[1], flags.split()))
    return found


def test_documented_commands_parse():
    found = commands()
    assert len(found) >= 20
    for page, script, flags in found:
        try:
            __import__(script).parse_args(flags)
        except SystemExit:
            pytest.fail(f"{page}: {script}.py {' '.join(flags)}")


def test_documented_torchrun_commands_are_accepted_with_their_number_of_processes():
    count = 0
    for name in [*pages(), *(f"{script}.py" for script in SCRIPTS)]:
        for line in joined_commands(read(name)):
            match = re.search(r"torchrun (.*?)(\w+)\.py((?: --[\w-]+(?: [^-\s]\S*)?)*)", line)
            if not match or match[2] not in SCRIPTS:
                continue
            count += 1
            module = SCRIPTS[match[2]]
            machines = 2 if "--nnodes" in match[1] else 1
            processes = machines * int(re.search(r"--nproc-per-node (\d+)", match[1])[1])
            args = module.parse_args(match[3].split())
            data = common.Data("x", range(10 ** 6), None, [], None, 500, None, "")
            module.fill_defaults(args, data, torch.device("cpu"))
            module.check_args(args, data, processes)
            assert args.images_per_step % processes == 0
    assert count >= 6


def test_flags_that_the_pages_name_exist():
    known = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id",
             "--index-url", "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node",
             "--cpus-per-task", "--signal", "--no-bf16", "--help"}
    for name in sources():
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', read(name)))
    for name in pages():
        named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", read(name)))
        assert named <= known, f"{name}: {sorted(named - known)}"


def test_links_of_the_pages_lead_somewhere():
    for name in pages():
        folder = os.path.dirname(f"{ROOT}/{name}")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(name)):
            assert os.path.exists(f"{folder}/{target}"), f"{name}: {target}"


def test_differences_on_the_pages_stand_in_the_tables():
    """A figure `+1.0 ± 2.2` of any page stands so in results/README.md, whose tables are tested."""
    tables = read("results/README.md") + read("results/notes.md")
    count = 0
    for name in ("README.md", *(f"results/{page}.md" for page in PAGES)):
        for figure in re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", read(name)):
            count += 1
            assert figure in tables, f"{name}: {figure}"
    assert count >= 6


def test_the_shell_loop_makes_a_folder_of_links(tmp_path):
    classes = ["n01", "n02", "n03"]
    for split in ("train", "val"):
        for name in classes:
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "imagenet100_classes.txt").write_text("n01\nn03\n")
    loop = re.search(r"```\n(mkdir -p imagenet100.*?)```", read("README.md"), re.S)[1]
    loop = loop.replace("/imagenet/", f"{tmp_path}/imagenet/")
    subprocess.run(["bash", "-e", "-c", loop], cwd=tmp_path, check=True)
    for split in ("train", "val"):
        folder = tmp_path / "imagenet100" / split
        assert sorted(os.listdir(folder)) == ["n01", "n03"]
        assert (folder / "n03").is_dir()


@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("resnet18", 64), ("resnet50", 128)])
def test_the_readme_loads_a_backbone_into_torchvision(arch, size, tmp_path, monkeypatch):
    """The snippet, run as it stands, on what save_run writes; strict loading is its default."""
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(saved = .*?)```", read("README.md"), re.S)[1]
    backbone, _ = common.make_backbone(arch, size)
    os.makedirs("runs/simclr_cifar10")
    torch.save({"arch": arch, "image_size": size, "small_images": size <= common.SMALL,
                "mean": (0.5,) * 3, "std": (0.2,) * 3, "state_dict": backbone.state_dict()},
               "runs/simclr_cifar10/backbone.pt")
    scope = {"torch": torch, "torchvision": torchvision}
    exec(snippet, scope)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(scope["net"].eval()(x), backbone.eval()(x))


def test_the_readme_runs_from_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = re.search(r"`import simclr_tc2; (simclr_tc2\.main\(\[.*?\]\))`", read("README.md"))[1]
    small = ["--data", "fake", "--arch", "resnet_tiny", "--batch-size", "64", "--max-steps", "1"]
    call = call.replace("])", f"] + {small})")
    exec(call)
    exec(call)
    assert (tmp_path / "runs" / "notebook" / "last.pt").exists()


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert re.findall(r"^pytest .*$", read("README.md"), re.M) == ["pytest -q tests"]
    assert "README.md" in read(".ci/run")


def test_evaluation_is_read_by_its_own_help():
    for protocol in re.search(r"--protocol ([a-z ]+)", read("README.md"))[1].split():
        assert protocol in eval_linear.PROTOCOLS
