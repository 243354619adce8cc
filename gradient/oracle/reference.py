"""Golden values for the three formats that the sparse codec is compared with.

The input is an error vector as oracle.py lays it out, in chunks of 4096. A payload is 2,
the format's number, the number of chunks (u32 LE) and a body; what it does not express is
left behind as the next error.

dense_fp16 (3): each real value, held to +-16, as a half float; no minus zero. A chunk's
high bytes come first, then its low ones.
dense_int8 (4): per chunk a step (f32): the largest magnitude, 16 at most, / 127, or 0 if
that is no normal f32; then each real value's nearest whole number of steps (i8).
Both bodies are a zstd frame; here is only what the frame contains.

flat12 (6), the published wire of SparseLoCo (arXiv 2508.15706): a matrix is cut into
blocks whose sides are the largest divisors of its own up to 64; any other tensor counts
as a single row. A block sends about one value in 64, if it can an even number: the largest
magnitudes (lower index first among equals), by index. The values that a tensor sends share
a shift (their mean) and four bins, 1.5 standard deviations wide and centred on -2, -1, 0
and 1 widths from the shift; each becomes the shift plus the mean of its bin.
Bytes of a tensor: shift and four bin means (f32 LE), bins (2 bits each, lowest first),
indices within the blocks (12 bits each, two in three bytes).

Numbers: rounded to f32 after each operation as in oracle.py; only mean, width, bins and
bin means of flat12 are worked out in double. In a case with "refused" a bin lies beyond
+-16, which a decoder of the protocol rejects.
"""
import sys
sys.dont_write_bytecode = True  # importing oracle.py leaves no cache beside it
import itertools, json, math, struct
from oracle import BIG, CHUNK, SMALL, chunks_of, drawn_error, error_of, f32, f32s, fnv, raw

# flat12 with an odd number sent, columns that a block does not span, three dimensions
AWKWARD = {"a": [67], "b": [9, 134], "c": [2, 3, 5]}

def dense_fp16(values):
    """The bytes of a chunk's real values, and the values that they stand for."""
    layout = "<%de" % len(values)
    halves = struct.unpack(layout, struct.pack(layout, *[max(-16, min(16, v)) for v in values]))
    halves = [half + 0.0 for half in halves]  # makes minus zero plus zero
    data = struct.pack(layout, *halves)
    return data[1::2] + data[::2], halves

def dense_int8(values):
    """As dense_fp16."""
    step = f32(min(16, max(abs(v) for v in values)) / 127)
    step = 0.0 if step < 2.0 ** -126 else step
    steps = f32s([v / step if step else 0.0 for v in values])
    codes = [max(-127, min(127, round(s))) for s in steps]  # round() takes ties to even
    return struct.pack("<f%db" % len(codes), step, *codes), f32s([c * step for c in codes])

def dense(form, error, layout):
    """The content of the frame, and the error left behind."""
    content, left = b"", list(error)
    for c, (_, real) in enumerate(chunks_of(layout)):
        chunk = slice(c * CHUNK, c * CHUNK + real)
        data, sent = form(error[chunk])
        content += data
        left[chunk] = f32s([e - s for e, s in zip(error[chunk], sent)])
    return content, left

def side(length):
    return max(divisor for divisor in range(1, 65) if length % divisor == 0)

def blocks_of(layout):
    """For every tensor: how many each block sends, and each block's places in the vector."""
    start, tensors = 0, []
    for name in sorted(layout):
        shape, size = layout[name], math.prod(layout[name])
        rows, columns = shape if len(shape) == 2 else (1, size)
        high, wide = side(rows), side(columns)
        share = max(1, (high * wide * 64 + 2048) // 4096)
        kept = min(high * wide, share + share % 2)
        inside = [row * columns + column for row in range(high) for column in range(wide)]
        corners = range(0, rows, high), range(0, columns, wide)
        tensors.append((kept, [[start + top * columns + first + i for i in inside]
                               for top, first in itertools.product(*corners)]))
        start += -(-size // CHUNK) * CHUNK
    return tensors

def added(values):
    total = 0.0
    for value in values:  # a plain loop, as sum() may compensate its rounding
        total += value
    return total

def quantise(values):
    """The shift, the four bin means and the bin of each value."""
    mean = added(values) / len(values)
    squares = added((value - mean) * (value - mean) for value in values)
    width, shift = 1.5 * math.sqrt(squares / max(1, len(values) - 1)), f32(mean)
    bins = [max(0, min(3, round((value - shift) / width + 2))) if width else 2 for value in values]
    totals = [added(v - shift for v, b in zip(values, bins) if b == which) for which in range(4)]
    return shift, [f32(t / max(1, bins.count(b))) for b, t in enumerate(totals)], bins

def encode(error, layout):
    """The flat12 payload, {place: sent value}, and whether a bin is beyond the limit."""
    payload, sent, beyond = struct.pack("<BBI", 2, 6, len(chunks_of(layout))), {}, False
    for kept, blocks in blocks_of(layout):
        indices, places = [], []
        for block in blocks:
            order = sorted(range(len(block)), key=lambda i: -abs(error[block[i]]))  # stable
            chosen = sorted(order[:kept])
            indices += chosen
            places += [block[i] for i in chosen]
        shift, means, bins = quantise([error[place] for place in places])
        levels = [f32(shift + mean) for mean in means]
        beyond = beyond or max(map(abs, levels)) > 16
        sent.update((place, levels[b]) for place, b in zip(places, bins))
        payload += struct.pack("<5f", shift, *means)
        for at in range(0, len(bins), 4):
            payload += bytes([sum(b << 2 * j for j, b in enumerate(bins[at:at + 4]))])
        for at in range(0, len(indices), 2):
            first, second = (indices[at:at + 2] + [0])[:2]
            three = [first & 0xff, first >> 8 | (second & 0xf) << 4, second >> 4]
            payload += bytes(three[:3 if at + 1 < len(indices) else 2])
    return payload, sent, beyond

def decode(payload, layout):
    """{place: value} of a flat12 payload; each field is read as one large number."""
    sent, at = {}, 6
    assert struct.unpack_from("<BBI", payload) == (2, 6, len(chunks_of(layout)))

    def take(count, width):
        nonlocal at
        size = -(-count * width // 8)
        assert at + size <= len(payload)
        number, at = int.from_bytes(payload[at:at + size], "little"), at + size
        assert number >> count * width == 0  # what fills up the last byte
        return [number >> width * j & (1 << width) - 1 for j in range(count)]
    for kept, blocks in blocks_of(layout):
        shift, *means = struct.unpack("<5f", struct.pack("<5I", *take(5, 32)))
        bins, indices = take(kept * len(blocks), 2), take(kept * len(blocks), 12)
        for n, (b, index) in enumerate(zip(bins, indices)):
            assert n % kept == 0 or indices[n - 1] < index
            sent[blocks[n // kept][index]] = f32(shift + means[b])
    assert at == len(payload)
    return sent

def flat12(error, layout):
    """The payload, the error left behind, and whether the protocol refuses it."""
    payload, sent, beyond = encode(error, layout)
    assert decode(payload, layout) == sent
    return payload, [f32(e - sent[i]) if i in sent else e for i, e in enumerate(error)], beyond

def golden():
    cases = []

    def add(layout, head, error):
        head = {"layout": "big" if layout is BIG else "small", **head}
        for form in dense_fp16, dense_int8:
            content, left = dense(form, error, layout)
            cases.append({"profile": form.__name__, **head, "content_bytes": len(content),
                          "content_fnv": fnv(content), "error_fnv": fnv(raw(left))})
        payload, left, beyond = flat12(error, layout)
        cases.append({"profile": "flat12", **head,
                      **({"payload": payload.hex()} if layout is SMALL else {}),
                      "payload_bytes": len(payload), "payload_fnv": fnv(payload),
                      "error_fnv": fnv(raw(left)), **({"refused": True} if beyond else {})})
    flat12(drawn_error(1, chunks_of(AWKWARD)), AWKWARD)  # only for its assertions
    for layout in BIG, SMALL:
        add(layout, {"input": "drawn", "seed": 1}, drawn_error(1, chunks_of(layout)))
    special = {"zero": lambda i: 0.0, "tiny": lambda i: 2.0 ** -31,
               "large": lambda i: 1e6 if i == 1000 else 0.0,
               "ties": lambda i: 0.5 if i % 3 == 0 else -0.25}
    for name, value in special.items():
        start = [value(c * CHUNK + i) if i < real else 0.0
                 for c, (_, real) in enumerate(chunks_of(SMALL)) for i in range(CHUNK)]
        zeros = [0.0] * len(start)
        add(SMALL, {"input": name}, error_of(start, zeros, zeros, f32(0.95)))
    return json.dumps({"cases": cases}, indent=1) + "\n"

def main(args):
    if args and (len(args) != 2 or args[0] != "--check"):
        sys.exit("usage: reference.py [--check FILE]")
    text = golden()
    if not args:
        return sys.stdout.write(text)
    with open(args[1], encoding="utf-8") as file:
        pairs = itertools.zip_longest(text.split("\n"), file.read().split("\n"))
    for line, (want, found) in enumerate(pairs, 1):
        if want != found:
            sys.exit("%s differs at line %d: expected %r, found %r" % (args[1], line, want, found))

if __name__ == "__main__":
    main(sys.argv[1:])
