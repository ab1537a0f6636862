"""The C file, compiled as strictly as the compiler can, against PyTorch."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from test_engine_inference import prune_to

import checkpoint
import export
import models
from bench import tables
from engine import c_source

WEIGHTS = tables.SHIPPED[0]
compiled = pytest.mark.skipif(export.compiler() is None, reason="needs a C compiler")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def pictures(n, size=28, grey=True):
    shape = (n, size, size) if grey else (n, 3, size, size)
    generator = torch.Generator().manual_seed(size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def cc(folder, *flags):
    return subprocess.run([*export.compiler(), *flags], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """SANITIZE if the compiler has it and its programs run, else nothing."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "a.c").write_text("int main(void) { return 0; }")
    works = cc(folder, *SANITIZE, "a.c").returncode == 0
    return SANITIZE if works and subprocess.run(folder / "a.out").returncode == 0 else []


def write_idx(path, images_u8):
    header = [0x0800 + images_u8.dim(), *images_u8.shape]
    path.write_bytes(np.array(header, ">i4").tobytes() + images_u8.numpy().tobytes())


def compare(folder, flags, model, images_u8, bits=32, classes=(), name="net"):
    """Compile with `flags`; program, library and PyTorch must agree."""
    meta = {"image_size": images_u8.shape[-1], "grey": images_u8.dim() == 3, "classes": classes}
    network, source = export.c_file(model, meta, name, bits)
    (folder / "net.c").write_text(source.text())
    made = cc(folder, *STRICT, *flags, "-O1", "-DCLASSIFY_MAIN", "net.c", "-o", "classify")
    assert made.returncode == 0, made.stderr[:2000]
    write_idx(folder / "images", images_u8)
    ran = subprocess.run([folder / "classify", folder / "images"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:2000]
    expected = models.infer(network, images_u8)
    assert [int(line) for line in ran.stdout.split()] == expected.argmax(1).tolist()
    logits = export.CLibrary(source.text(), name, expected.shape[1])(images_u8)
    assert export.check(logits, expected) < 1
    return source


@compiled
@pytest.mark.parametrize(
    "bits", [32, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (16, 4))]
)
def test_the_shipped_network_fits_a_small_device(bits, tmp_path, sanitizers):
    model, meta = checkpoint.load(WEIGHTS)
    source = compare(tmp_path, sanitizers, model, pictures(20), bits, meta["classes"])
    assert source.memory_bytes <= 128_000
    assert cc(tmp_path, *STRICT, "-Os", "-c", "net.c").returncode == 0
    objects = (tmp_path / "net.o").stat().st_size
    assert objects <= {32: 600_000, 16: 450_000}.get(bits, 320_000)


@compiled
@pytest.mark.parametrize(
    ("size", "grey", "stem", "budget"),
    [(33, False, 4, 50_000), (28, True, 2, 60_000), (17, False, 2, 50_000), (19, True, 1, 30_000)],
)
def test_color_odd_sizes_and_small_stems(size, grey, stem, budget, narrow, tmp_path, sanitizers):
    torch.manual_seed(0)
    model = prune_to(models.build("resnet18", 3, stem=stem), budget, size)
    if not grey:
        model.conv1.weight.data[:, 1:] = 0.1 * torch.randn_like(model.conv1.weight[:, 1:])
    compare(tmp_path, sanitizers, model, pictures(3, size, grey))


@compiled
def test_a_dense_network_and_resnet50(narrow_resnet18, tmp_path, sanitizers):
    compare(tmp_path, [], narrow_resnet18.eval(), pictures(2))
    compare(tmp_path, sanitizers, prune_to(models.build("resnet50", 4), 60_000), pictures(2))


@compiled
def test_dead_channels_and_empty_layers(narrow_resnet18, tmp_path, sanitizers):
    resnet18 = prune_to(narrow_resnet18, 50_000)
    with torch.no_grad():
        resnet18.layer1[0].conv1.weight.zero_()
        resnet18.layer2[0].downsample[0].weight.zero_()
        resnet18.fc.weight[3] = 0
    compare(tmp_path, sanitizers, resnet18, pictures(3), 8)


HOSTILE = [
    "*/ int x;",
    'a"; int y; "',
    "line\nbreak\r",
    "??/",
    "\\",
    "\0",
    "\u2028é",
    "%d%n",
    "//",
    "??)",
]


@compiled
def test_class_names_stay_in_their_strings(narrow_resnet18, tmp_path):
    model = prune_to(narrow_resnet18, 50_000)
    source = compare(tmp_path, ["-trigraphs"], model, pictures(2), classes=HOSTILE)
    writes = "".join(
        f"fwrite(net_classes[{i}], {len(name.encode())}, 1, stdout);"
        for i, name in enumerate(HOSTILE)
    )
    program = f"\n#include <stdio.h>\nint main(void) {{ {writes} return 0; }}\n"
    (tmp_path / "names.c").write_text(source.text() + program)
    assert cc(tmp_path, *STRICT, "-trigraphs", "names.c", "-o", "names").returncode == 0
    printed = subprocess.run(tmp_path / "names", capture_output=True).stdout
    assert printed == "".join(HOSTILE).encode()


@compiled
@pytest.mark.parametrize("name", ["NET_SIZE28", "CLASSES", "f", "memory", "conv1"])
def test_any_name_is_the_prefix_of_a_program_that_compiles(name, narrow, tmp_path):
    torch.manual_seed(0)
    model = prune_to(models.build("resnet18", 3), 50_000)
    source = compare(tmp_path, [], model, pictures(1), name=name)
    assert f"void {name}_logits(const uint8_t *image, float *logits)\n{{" in source.text()


CALLER = r"""#include "net.h"
#include <stdio.h>
int main(void)
{
    static uint8_t image[28 * 28];
    float logits[12] = {0};
    net_logits(image, logits);
    for (int i = 0; i < 12; i++)
        printf("%s %.4f\n", net_classes[i], logits[i]);
    return 0;
}
"""


@compiled
@pytest.mark.parametrize("languages", [("c", "c"), ("c", "c++"), ("c++", "c++"), ("c++", "c")])
def test_a_header_serves_callers_in_c_and_c_plus_plus(languages, narrow, tmp_path):
    """A network without names of classes; each class then has its number as its name."""
    compilers = {"c": export.compiler(), "c++": [shutil.which("g++") or shutil.which("c++")]}
    if compilers["c++"] == [None]:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(0)
    model = prune_to(models.build("resnet18", 12), 50_000)
    text = c_source.CSource(model, 28, True, "net").text()
    lines = text.splitlines()
    end = [n for n, line in enumerate(lines) if line == "#endif"][1]
    header = lines[lines.index("#include <stdint.h>") : end + 1]
    (tmp_path / "net.h").write_text("\n".join(header) + "\n")
    (tmp_path / "net.c").write_text(text)
    (tmp_path / "caller.c").write_text(CALLER)
    for language, file in zip(languages, ("net", "caller"), strict=True):
        command = [*compilers[language], "-x", language, "-Wall", "-Wextra", "-Werror", "-pedantic"]
        done = subprocess.run(
            [*command, "-c", f"{file}.c"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:2000]
    link = [*compilers["c++" if "c++" in languages else "c"], "net.o", "caller.o", "-o", "caller"]
    subprocess.run(link, cwd=tmp_path, check=True)
    printed = subprocess.run(tmp_path / "caller", capture_output=True, text=True).stdout
    logits = models.infer(model, torch.zeros(1, 28, 28, dtype=torch.uint8))[0]
    lines = [line.split() for line in printed.splitlines()]
    assert [name for name, _ in lines] == [str(number) for number in range(12)]
    numbers = torch.tensor([float(number) for _, number in lines])
    torch.testing.assert_close(numbers, logits, atol=2e-4, rtol=1e-3)


def test_each_class_needs_a_name(narrow):
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        c_source.CSource(models.build("resnet18", 3), 28, True, "net", classes=["cat", "dog"])


def test_file_names_become_identifiers():
    for name, expected in (("a-b c", "a_b_c"), ("8bit", "net_8bit"), ("é", "net__"), ("", "net_")):
        assert c_source.identifier(name) == expected


@compiled
def test_the_program_refuses_what_is_no_idx_file_of_its_images(narrow_resnet18, tmp_path):
    compare(tmp_path, [], prune_to(narrow_resnet18, 50_000), pictures(1))
    good = (tmp_path / "images").read_bytes()
    write_idx(tmp_path / "small", pictures(1, 20))
    for name, content in (
        ("short", good[:-1]),
        ("header", good[:10]),
        ("empty", b""),
        ("kind", b"\1" + good[1:]),
        ("small", (tmp_path / "small").read_bytes()),
        ("negative", good[:4] + b"\xff" + good[5:]),
    ):
        (tmp_path / name).write_bytes(content)
        ran = subprocess.run([tmp_path / "classify", tmp_path / name], capture_output=True)
        assert ran.returncode == 2 and ran.stderr.count(b"\n") == 1, name
    assert subprocess.run([tmp_path / "classify", "absent"], capture_output=True).returncode == 2
