"""A network as one file of C99 (or C++) that needs nothing else: the plan of plan.py, written as C.

    text = CSource(model, image_size=28, grey=True, name="pruned_resnet18").text()

Tables hold the non-zero weights, output channel by output channel: their number, their values
(floats, or integers with a scale for each channel), and their gaps, the distances between the
offsets at which consecutive weights read. Products of the same shapes share a function. Its inner
loops have constant lengths, so that a compiler keeps a channel's sums in registers. All feature
maps share one static memory, in which unused ones are overwritten.
"""

import re
import string
from collections.abc import Sequence

import numpy as np
from torch import nn

from engine.plan import FeatureMap, Plan, Product, sparse_copy

POSITIONS = 16  # of a vector; a compiler may split it
SUMS = 6  # vectors at a time, about as many as fit the registers
FLAT = 12  # pixels a side; up to here, a feature map with its border is one row of positions
WIDTH = 98  # characters of a line of numbers
DTYPES = {"float": np.float32, "int8_t": np.int8, "int16_t": np.int16, "uint8_t": np.uint8,
          "uint16_t": np.uint16, "uint32_t": np.uint32}  # fmt: skip


class CSource:
    """The C file of a torchvision ResNet for square images of `image_size` pixels.

    `name` is a C identifier, see `identifier`. `bits`: 32 for float weights; 16, or 2 to 8, for
    integers with a scale for each output channel, exact for weights of `checkpoint.fake_quantize`
    (the first layer's stay floats). `classes` are names, of any characters; by default "0", "1" and
    so on. `file` is the name of the file in its comment, by default that of the network. Raises
    ValueError for a wrong number of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int,
        grey: bool,
        name: str,
        bits: int = 32,
        classes: Sequence[str] = (),
        file: str = "",
    ):
        network = sparse_copy(model, grey)
        self.plan = Plan(network, image_size, images=1, positions=POSITIONS)
        count = self.plan.logits.channels
        self.classes = [*classes] or [str(n) for n in range(count)]
        if len(self.classes) != count:
            raise ValueError(f"{len(self.classes)} names for {count} classes")
        self.name, self.bits = name, bits
        self.file = file if re.fullmatch(r"\w[\w.-]*", file, re.A) else f"{name}.c"
        self.table_bytes = 0
        self.tables: list[str] = []
        self.functions: dict[str, str] = {}  # names by texts
        self.cells = self.plan.cells
        cleared = zip(self.plan.products, self.plan.cleared[1:], strict=True)
        self.steps = [line for p, maps in cleared for line in self._step(p, maps)]

    @property
    def memory_bytes(self) -> int:
        """RAM for the feature maps."""
        return 4 * self.cells

    def text(self, notes: Sequence[str] = ()) -> str:
        """The file; `notes` are lines for the comment at its top."""
        image, logits = self.plan.image, self.plan.logits
        program = string.Template(PROGRAM).substitute(
            name=self.name, classes=logits.channels, channels=image.channels, size=image.size
        )
        parts = [
            self._comment(notes),
            string.Template(HEAD).substitute(name=self.name, classes=logits.channels),
            f"const char *const {self.name}_classes[{logits.channels}] = {{",
            *(f"    {_string(name)}," for name in self.classes),
            "};\n",
            *self.tables,
            f"static float memory[{self.cells}];\n",
            *(string.Template(text).substitute(f=f) for text, f in self.functions.items()),
            *self._entry(),
            program,
        ]
        return "\n".join(parts)

    def _comment(self, notes: Sequence[str]) -> str:
        image, name = self.plan.image, self.name
        layout = "" if image.channels == 1 else "three planes (red, green, blue) of "
        lines = [
            *(note.replace("*/", "* /") for note in notes),
            "",
            f"{name}_logits takes {layout}{image.size} rows of {image.size} pixels in 0..255.",
            f"It writes {self.plan.logits.channels} logits; the largest is that of the class.",
            f"{name}_classes has the names of the classes. One thread may call it at a time.",
            "The lines from `#include <stdint.h>` to the second `#endif` are a header.",
            "",
            f"Flash: {self.table_bytes / 1000:,.0f} kB of tables and 7 to 30 kB of code.",
            f"RAM: {self.memory_bytes / 1000:,.0f} kB and some stack.",
            "",
            "To compile it for your program, or as a program that prints the class of each",
            f"image in an IDX file of images of {image.size} x {image.size}:",
            "",
            f"    cc -O3 -march=native -c {self.file}",
            f"    cc -O3 -march=native -DCLASSIFY_MAIN {self.file} -o classify",
            "    ./classify images-idx3-ubyte",
        ]
        return "\n".join(["/*", *(f" * {line}".rstrip() for line in lines), " */"])

    # --- tables ---------------------------------------------------------------------------------

    def _table(self, kind: str, name: str, numbers: np.ndarray) -> str:
        """Add an array of constants; returns its name."""
        numbers = numbers.astype(DTYPES[kind]) if len(numbers) else np.zeros(1, DTYPES[kind])
        suffix = "f" if kind == "float" else ""
        lines = [""]
        for number in numbers.astype(str):
            if len(lines[-1]) + len(number) + 2 > WIDTH:
                lines.append("")
            lines[-1] += f"{number}{suffix},"
        self.table_bytes += numbers.nbytes
        body = "\n".join(lines)
        self.tables.append(f"static const {kind} {name}[{len(numbers)}] = {{\n{body}\n}};\n")
        return name

    def _weights(self, p: Product) -> list[tuple[str, str]]:
        """Types and names of the tables of a product."""
        name, rows, kept = re.sub(r"\W", "_", p.name), len(p.bias), p.values.numpy() != 0
        row = np.repeat(np.arange(rows), np.diff(p.starts.numpy()))[kept]
        offsets, values = p.offsets.numpy()[kept].astype(np.int64), p.values.numpy()[kept]
        order = np.lexsort((offsets, row))
        row, offsets, values = row[order], offsets[order], values[order]
        gaps = np.diff(offsets, prepend=0)
        begins = np.diff(row, prepend=-1) > 0
        gaps[begins] = offsets[begins]
        tables, weight = [], "float"
        if self.bits < 32 and p is not self.plan.products[0]:
            weight = "int8_t" if self.bits <= 8 else "int16_t"
            steps = 2 ** (self.bits - 1) - 1
            scales = np.zeros(rows, np.float32)
            np.maximum.at(scales, row, np.abs(values))
            scales /= steps
            levels = np.rint(values / scales[row])
            values = np.where(levels == 0, np.sign(values), levels)  # the count stays
            tables.append(("float", f"{name}_scales", scales))
        # Zero weights split a gap that is too long for its type.
        choices = {}
        for kind, longest in (("uint8_t", 255), ("uint16_t", 65535)):
            fillers = np.maximum(gaps - 1, 0) // longest
            entries = len(gaps) + int(fillers.sum())
            size = entries * np.dtype(DTYPES[kind]).itemsize
            size += entries * np.dtype(DTYPES[weight]).itemsize
            choices[size] = kind, longest, fillers, entries
        kind, longest, fillers, entries = choices[min(choices)]
        places = np.arange(len(gaps)) + fillers.cumsum()
        all_gaps, all_values = np.full(entries, longest), np.zeros(entries, np.float32)
        all_gaps[places], all_values[places] = gaps - longest * fillers, values
        counts = np.bincount(row, 1 + fillers, rows)
        tables = [
            ("uint16_t" if counts.max() < 65536 else "uint32_t", f"{name}_counts", counts),
            (kind, f"{name}_gaps", all_gaps),
            (weight, f"{name}_weights", all_values),
            *tables,
            ("float", f"{name}_bias", p.bias.numpy()),
        ]
        return [(kind, self._table(kind, table, numbers)) for kind, table, numbers in tables]

    # --- code -----------------------------------------------------------------------------------

    def _function(self, kind: str, lines: Sequence[str]) -> str:
        """The name of the function with these lines, a template in which its name is $f."""
        text = "\n".join([*lines, ""])
        return self.functions.setdefault(text, f"{kind}{len(self.functions)}")

    def _step(self, p: Product, cleared: Sequence[FeatureMap]) -> list[str]:
        """The call that computes a product."""
        source, target = p.source.base, p.target.base
        lines = [f"    /* {p.name} */"]
        if p.copy:  # of the border too
            copy = self._function("copy", _copy(p.source, p.target))
            return [*lines, f"    {copy}(memory + {source}, memory + {target});"]
        lines += map(self._clear, cleared)
        tables = self._weights(p)
        pool = pooled = ""
        if p.pool:
            pool = self._function("pool", _pool(p))
            pooled = f", memory + {p.pooled.base}"
        body, reads = _product(p, [kind for kind, _ in tables], pool)
        product = self._function("product", body)
        # The last vector may reach beyond the feature map.
        furthest = int(p.offsets.max()) if len(p.offsets) else 0
        rows = 0 if p.pool else len(p.bias) - 1
        writes = rows * p.target.stride + p.target.at(0, 0) + reads
        self.cells = max(self.cells, source + furthest + reads, target + writes)
        lowest = "0" if p.relu else "-FLT_MAX"
        return [
            *lines,
            f"    {product}({len(p.bias)}, {int(p.add)}, {lowest},",
            *(f"        {name}," for _, name in tables),
            f"        memory + {source}, memory + {target}{pooled});",
        ]

    def _clear(self, m: FeatureMap) -> str:
        return f"    memset(memory + {m.base}, 0, {m.cells} * sizeof *memory);"

    def _entry(self) -> list[str]:
        image, logits = self.plan.image, self.plan.logits
        place, p, border, side = image.base, image.phases, image.border, image.side
        phase = f"((y + {border}) % {p} * {p} + (x + {border}) % {p})"
        at = f"({phase} * {side} + (y + {border}) / {p}) * {side} + (x + {border}) / {p}"
        return [
            f"void {self.name}_logits(const uint8_t *image, float *logits)",
            "{",
            *map(self._clear, self.plan.cleared[0]),
            f"    for (int c = 0; c < {image.channels}; c++)",
            f"        for (int y = 0; y < {image.size}; y++)",
            f"            for (int x = 0; x < {image.size}; x++)",
            f"                memory[{place} + c * {image.stride} + {at}] =",
            "                    *image++ / 127.5f - 1;",
            *self.steps,
            f"    memcpy(logits, memory + {logits.base}, {logits.channels} * sizeof *logits);",
            "}",
            "",
        ]


def _product(p: Product, kinds: list[str], pool: str) -> tuple[list[str], int]:
    """A function for products of this shape, and how many positions it reads for a weight.

    Sums are in rows of vectors of `width` positions; rows are `step` positions apart in the source
    and `stride` in the target.
    """
    size, step, stride = p.target.size, p.source.side, p.target.side
    rows, columns, inside, table = size, size, "", []
    width = min(POSITIONS, 1 << (size - 1).bit_length())
    if flat := size <= FLAT and step == stride:  # one row, with the border between the pixels
        cells = (size - 1) * stride + size
        width = POSITIONS if cells > 8 else min(8, 1 << (cells - 1).bit_length())
        rows, columns = -(-cells // width), width
    vectors = -(-rows // -(-rows // SUMS))  # at a time
    turns = 4 if vectors * width <= 8 else 1  # several sums, if one would wait for itself
    padded = -(-rows // vectors) * vectors
    if flat and cells > 1:
        pixels = [int(i < cells and i % stride < size) for i in range(padded * width)]
        row = "".join(f"{pixel}," for pixel in pixels)
        table = [f"static const uint8_t ${{f}}_inside[{len(pixels)}] = {{", row, "};", ""]
        inside = f"${{f}}_inside[{width} * (row + v) + j] ? sum : *to"
    if flat:
        step = stride = width
    names = ["counts", "gaps", "weights", "scales", "bias"]
    names = names if len(kinds) == 5 else [n for n in names if n != "scales"]
    tables = ", ".join(f"const {kind} *{name}" for kind, name in zip(kinds, names, strict=True))
    total = " + ".join(f"sums[{turn}][v][j]" for turn in range(turns))
    scaled = f"({total}) * scales[o]" if "scales" in names else total
    left = f" && row + v < {rows}" if rows % vectors and not flat else ""
    above = f" && column + j < {columns}" if columns % width else ""
    after = f"{pool}(y, pooled);\n        pooled" if pool else "y"
    text = f"""/* To {size} x {size} pixels: {vectors} x {width} positions at a time. */
static void $f(int channels, int add, float lowest,
    {tables},
    const float *x, float *y{", float *pooled" if pool else ""})
{{
    for (int o = 0; o < channels; o++) {{
        const int count = (int)counts[o];
        for (int row = 0; row < {rows}; row += {vectors})
            for (int column = 0; column < {columns}; column += {width}) {{
                float sums[{turns}][{vectors}][{width}];
                const float *from = x + row * {step} + column;
                int k = 0;
                memset(sums, 0, sizeof sums);
                for (; k + {turns} <= count; k += {turns})
                    UNROLL for (int u = 0; u < {turns}; u++) {{
                        const float w = weights[k + u];
                        from += gaps[k + u];
                        UNROLL for (int v = 0; v < {vectors}; v++)
                            UNROLL for (int j = 0; j < {width}; j++)
                                sums[u][v][j] += w * from[{step} * v + j];
                    }}
                for (; k < count; k++) {{
                    const float w = weights[k];
                    from += gaps[k];
                    UNROLL for (int v = 0; v < {vectors}; v++)
                        UNROLL for (int j = 0; j < {width}; j++)
                            sums[0][v][j] += w * from[{step} * v + j];
                }}
                for (int v = 0; v < {vectors}{left}; v++)
                    for (int j = 0; j < {width}{above}; j++) {{
                        float *to = y + {p.target.at(0, 0)} + (row + v) * {stride} + column + j;
                        float sum = {scaled} + bias[o] + (add ? *to : 0);
                        sum = sum > lowest ? sum : lowest;
                        *to = {inside or "sum"};
                    }}
            }}
        gaps += count;
        weights += count;
        {after} += {(p.pooled or p.target).stride};
    }}
}}"""
    reads = (padded - 1) * max(step, stride) + -(-columns // width) * width
    return [*table, *text.splitlines()], reads


def _copy(source: FeatureMap, target: FeatureMap) -> list[str]:
    """A function that sorts the pixels of each channel by their remainders modulo a stride."""
    p, side, channels = target.phases, source.side, source.channels
    whole = source.size + 2 * source.border  # beyond a row: the border of the next
    return [
        f"/* {channels} x {whole} x {whole}: every {p}th pixel of every {p}th row together. */",
        "static void $f(const float *x, float *y)",
        "{",
        f"    for (int c = 0; c < {channels}; c++, x += {source.stride})",
        f"        for (int i = 0; i < {p}; i++)",
        f"            for (int j = 0; j < {p}; j++, y += {target.side**2})",
        f"                for (int v = 0; {p} * v + i < {whole}; v++)",
        f"                    for (int u = 0; {p} * u + j < {whole}; u++)",
        f"                        y[{target.side} * v + u] =",
        f"                            x[({p} * v + i) * {side} + {p} * u + j];",
        "}",
    ]


def _pool(p: Product) -> list[str]:
    """A function for the max-pool of one channel, whose border and smallest value are zero."""
    size, side, kernel, stride = p.pooled.size, p.target.side, p.pool.kernel_size, p.pool.stride
    whole = p.target.size + 2 * p.target.border
    return [
        f"/* The largest of each {kernel} x {kernel}, {stride} apart. */",
        "static void $f(const float *x, float *y)",
        "{",
        f"    y += {p.pooled.at(0, 0)};",
        f"    for (int v = 0; v < {size}; v++, x += {stride * side}, y += {p.pooled.side}) {{",
        f"        float rows[{whole}];",
        f"        memcpy(rows, x, {whole} * sizeof *rows);",
        f"        for (int i = 1; i < {kernel}; i++)",
        f"            for (int j = 0; j < {whole}; j++)",
        f"                rows[j] = x[{side} * i + j] > rows[j] ? x[{side} * i + j] : rows[j];",
        f"        for (int u = 0; u < {size}; u++) {{",
        f"            y[u] = rows[{stride} * u];",
        f"            for (int j = 1; j < {kernel}; j++)",
        f"                y[u] = rows[{stride} * u + j] > y[u] ? rows[{stride} * u + j] : y[u];",
        "        }",
        "    }",
        "}",
    ]


def _string(text: str) -> str:
    """A C string: special characters become octal escapes, `?` too because of trigraphs."""
    return '"' + "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}"
        for byte in text.encode(errors="replace")
    ) + '"'  # fmt: skip


def identifier(name: str) -> str:
    """`name` as the beginning of a C identifier."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return name if name[:1].isalpha() else f"net_{name}"


HEAD = """#include <float.h>
#include <string.h>

#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
extern const char *const ${name}_classes[$classes];
void ${name}_logits(const uint8_t *image, float *logits);
#ifdef __cplusplus
}
#endif

#ifdef __clang__ /* which keeps sums in registers only with this; GCC does so by itself */
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL
#endif
"""

PROGRAM = r"""#ifdef CLASSIFY_MAIN
#include <stdio.h>

/* The next four bytes of a file, highest first; -1 at its end. */
static long number(FILE *file)
{
    long value = 0;
    for (int i = 0; i < 4; i++) {
        const int byte = getc(file);
        if (byte == EOF || (i == 0 && byte > 127))
            return -1;
        value = value * 256 + byte;
    }
    return value;
}

int main(int argc, char **argv)
{
    static uint8_t image[$channels * $size * $size];
    float logits[$classes];
    if (argc != 2) {
        fprintf(stderr, "usage: %s FILE (an unpacked IDX file of images)\n", argv[0]);
        return 2;
    }
    FILE *file = fopen(argv[1], "rb");
    if (file == NULL) {
        fprintf(stderr, "%s: cannot be opened\n", argv[1]);
        return 2;
    }
    const long kind = number(file), images = number(file);
    int fits = images >= 0 && kind == ($channels == 1 ? 0x0803 : 0x0804);
    if ($channels > 1)
        fits = fits && number(file) == $channels;
    fits = fits && number(file) == $size && number(file) == $size;
    if (!fits) {
        fprintf(stderr, "%s: not an IDX file of images of $size x $size\n", argv[1]);
        return 2;
    }
    for (long i = 0; i < images; i++) {
        int best = 0;
        if (fread(image, sizeof image, 1, file) != 1) {
            fprintf(stderr, "%s: ends before its last image\n", argv[1]);
            return 2;
        }
        ${name}_logits(image, logits);
        for (int c = 1; c < $classes; c++)
            best = logits[c] > logits[best] ? c : best;
        printf("%d\n", best);
    }
    fclose(file);
    return 0;
}
#endif
"""
