"""Golden values for the sparse update codec and the merge, worked out a second time.

Numbers: each operation is done on doubles that hold f32 values and then rounded to f32,
which gives exactly the f32 result; nothing is fused. Only the mean of the kept values
and the ratio of norms stay in double; norms and weights start from exact integers.

Vector: tensors by name, each padded with zeros to chunks of 4096. A chunk with `real`
values keeps the ceil(k*real/4096) largest magnitudes (lower index first among equals),
none below 2^-30. They all become plus or minus one scale, a point of a ladder with
eight steps per octave. What is left is the error, which the next update takes up again.

Bits of a chunk, highest first: 0 if it is full and has the usual Rice parameter, else
1, the parameter (3 bits), full (1 bit) and, if not full, the count. Unless empty, then
the scale (8 bits), all gaps' Rice quotients in unary, and per value the remainder and
the sign. 64 chunks form a group, which ends on a byte. A payload is 2, the profile, the number of chunks (u32 LE),
the groups' lengths (u16 LE each), the groups.

Merge: agg = sum(weight*factor*value) / denominator where anybody sent, else 0; then
residual += alpha*agg. The residual is coded like an error with the broadcast profile,
and what is sent leaves both the residual and theta. Taking back worker q of an earlier
round first adds alpha*(agg without q - agg), all with that round's own numbers.

Inputs: "zero", "tiny", "large" and "ties" are start vectors with end = e_in = 0; indices
count the padded vector from 0. A revocation starts from the drawn theta and residual,
once as they are and once after the earlier round was merged into them.
"""
import bisect, json, math, struct, sys
from fractions import Fraction

CHUNK, GROUP, UNIT = 4096, 64, 1 << 24
PROFILES = {"standard": (1, 64, 5), "quality": (2, 128, 4), "wide": (5, 320, 3)}
SMALL = {"a": [70, 100], "b": [5], "d": [4100]}
BIG = {**SMALL, "c": [3, 4096], "e": [64, 4096]}
LADDER = "3f800000 3f8b95c2 3f9837f0 3fa5fed7 3fb504f3 3fc5672a 3fd744fd 3feac0c7"

def raw(values):
    return struct.pack("<%df" % len(values), *values)

def f32s(values):
    return list(struct.unpack("<%df" % len(values), raw(values)))

def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]

STEPS = struct.unpack(">8f", bytes.fromhex(LADDER))
SCALES = [STEPS[n % 8] * 2.0 ** (n // 8 - 30) for n in range(256)]
BOUNDS = [f32(f32(SCALES[n] + SCALES[n + 1]) * 0.5) for n in range(255)]

def chunks_of(layout):
    """(tensor, real values) of every chunk in canonical order."""
    sizes = [(t, math.prod(layout[t])) for t in sorted(layout)]
    return [(t, min(CHUNK, size - at)) for t, size in sizes for at in range(0, size, CHUNK)]

def fnv(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return "%016x" % h

def bits(value, width):
    return format(value, "0%db" % width) if width else ""

def chunk_bits(error, real, keep, usual):
    """The bits of one chunk's error, and {index in the chunk: sent value}."""
    most = -(-(keep * real) // CHUNK)
    order = [i for i in range(real) if abs(error[i]) >= 2.0 ** -30]
    order.sort(key=lambda i: -abs(error[i]))  # stable: the lower index stays first
    chosen = sorted(order[:most])
    count, full = len(chosen), len(chosen) == most
    gaps = [i - before - 1 for before, i in zip([-1] + chosen, chosen)]

    def cost(r):
        return sum(g >> r for g in gaps) + count * (1 + r) + (1 if full and r == usual else 5)
    rice = min(range(8), key=cost)  # min takes the lowest of equals
    text = "0"
    if not full or rice != usual:
        text = "1" + bits(rice, 3) + bits(full, 1)
        text += "" if full else bits(count, (most - 1).bit_length())
    if not chosen:
        return text, {}
    total = 0.0
    for i in chosen:  # a plain loop, as sum() may compensate its rounding
        total += abs(error[i])
    scale = bisect.bisect_right(BOUNDS, total / count)
    text += bits(scale, 8)
    text += "".join("0" * (g >> rice) + "1" for g in gaps)
    for i, g in zip(chosen, gaps):  # a chosen value is never zero, so < 0 is its sign bit
        text += bits(g % (1 << rice), rice) + bits(error[i] < 0, 1)
    return text, {i: SCALES[scale] if error[i] > 0 else -SCALES[scale] for i in chosen}

def encode(error, chunks, profile):
    """The payload of an error vector, and {index: sent value}."""
    number, keep, usual = PROFILES[profile]
    groups, sent = [""] * -(-len(chunks) // GROUP), {}
    for c, (_, real) in enumerate(chunks):
        text, values = chunk_bits(error[c * CHUNK:(c + 1) * CHUNK], real, keep, usual)
        groups[c // GROUP] += text
        sent.update((c * CHUNK + i, v) for i, v in values.items())
    padded = [g + "0" * (-len(g) % 8) for g in groups]
    packed = [int(g, 2).to_bytes(len(g) // 8, "big") for g in padded]
    head = struct.pack("<BBI%dH" % len(packed), 2, number, len(chunks), *map(len, packed))
    return head + b"".join(packed), sent

def decode(payload, chunks):
    """{index: value} of a payload."""
    version, number, total = struct.unpack_from("<BBI", payload)
    assert version == 2 and total == len(chunks)
    keep, usual = next(p[1:] for p in PROFILES.values() if p[0] == number)
    lengths = struct.unpack_from("<%dH" % -(-total // GROUP), payload, 6)
    start, values, rest = 6 + 2 * len(lengths), {}, ""

    def take(width):
        nonlocal rest
        assert len(rest) >= width
        head, rest = rest[:width], rest[width:]
        return int(head or "0", 2)
    for c, (_, real) in enumerate(chunks):
        if c % GROUP == 0:
            data = payload[start:start + lengths[c // GROUP]]
            start, rest = start + len(data), "".join(bits(byte, 8) for byte in data)
        count, rice, index = -(-(keep * real) // CHUNK), usual, -1
        if take(1):
            rice = take(3)
            count = count if take(1) else take((count - 1).bit_length())
        scale = SCALES[take(8)] if count else 0.0
        quotients = [0] * count
        for j in range(count):
            while not take(1):
                quotients[j] += 1
        for quotient in quotients:
            index += 1 + (quotient << rice) + take(rice)
            assert index < real
            values[c * CHUNK + index] = -scale if take(1) else scale
        if c % GROUP == GROUP - 1 or c == total - 1:  # only padding may follow
            assert len(rest) < 8 and "1" not in rest
    assert start == len(payload)
    return values

def send(error, chunks, profile):
    """Payload, {index: sent value} and the error left behind; checks the codec as well."""
    payload, sent = encode(error, chunks, profile)
    assert decode(payload, chunks) == sent
    values = [sent.get(i, 0.0) for i in range(len(error))]
    zeros = [0.0] * len(error)
    assert encode(error_of(values, zeros, zeros, 0.0), chunks, profile) == (payload, sent)
    return payload, sent, [f32(e - sent[i]) if i in sent else e for i, e in enumerate(error)]

def error_of(start, end, e_in, beta):
    old = f32s([beta * e for e in e_in])
    return f32s([a + b for a, b in zip(old, f32s([a - b for a, b in zip(start, end)]))])

def draw(seed, s, chunks):
    """Drawn values at the real places, zeros in the padding."""
    x, out = seed, []
    for _, real in chunks:
        us = []
        for _ in range(real):
            x = (6364136223846793005 * x + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
            us.append(((x >> 40) - (1 << 23)) / (1 << 23))
        cubes = f32s([square * u for square, u in zip(f32s([u * u for u in us]), us)])
        out += [v * s for v in cubes] + [0.0] * (CHUNK - real)  # s only moves the exponent
    return out

def drawn_error(seed, chunks):
    start = draw(seed * 1000 + 1, 2.0 ** -5, chunks)
    step = draw(seed * 1000 + 2, 2.0 ** -8, chunks)
    end = f32s([a - b for a, b in zip(start, step)])
    return error_of(start, end, draw(seed * 1000 + 3, 2.0 ** -9, chunks), f32(0.95))

def weight(tokens, n, total):
    """Nearest f32 of tokens*n/total; the double only tells the exponent."""
    exponent = math.frexp(tokens * n / total)[1] - 24
    return round(Fraction(tokens * n, total) / Fraction(2) ** exponent) * 2.0 ** exponent

def counted(factors):
    """Who is not left out whole; all, if everybody is."""
    those = [any(factor.values()) for factor in factors]
    return those if any(those) else [True] * len(those)

def admit(payloads, tokens, rule, chunks, effects=()):
    """A frozen round: each worker's values, weight, and {tensor: factor in 2^-24}."""
    n, norms = len(tokens), []
    values = [decode(payload, chunks) for payload in payloads]
    for sent in values:
        norms.append({tensor: 0 for tensor, _ in chunks})
        for i, v in sent.items():
            norms[-1][chunks[i // CHUNK][0]] += math.floor(Fraction(v) ** 2 * 2 ** 72)
    factors = [{tensor: UNIT for tensor in norm} for norm in norms]
    for tensor in norms[0]:
        median = sorted(norm[tensor] for norm in norms)[(n - 1) // 2]
        for norm, factor in zip(norms, factors):
            if rule == "median_norm" and norm[tensor] > median:
                ratio = float(median) / float(norm[tensor])  # two roundings, then the ratio's
                factor[tensor] = min(UNIT, math.floor(math.sqrt(ratio) * UNIT))
    if rule == "loss_gate":
        median = sorted(effects)[(n - 1) // 2]
        deviation = sorted(abs(effect - median) for effect in effects)[n // 2]
        for effect, factor in zip(effects, factors):
            if effect > max(0, median + 6 * deviation):
                factor.update((tensor, 0) for tensor in factor)
    merged = [t for t, counts in zip(tokens, counted(factors)) if counts]
    return values, [weight(t, len(merged), sum(merged)) for t in tokens], factors

def aggregate(admitted, denominator, chunks, without=()):
    """{index: agg} where anybody sent; floor and W still count those taken back."""
    counts = counted(admitted[2])
    num, contrib, heaviest, everyone, n = {}, {}, {}, 0.0, sum(counts)
    for r, (sent, w, factor) in enumerate(zip(*admitted)):
        everyone = f32(everyone + w) if counts[r] else everyone
        for i, v in sent.items() if r not in without else ():
            if factor[chunks[i // CHUNK][0]] == 0:
                continue
            scaled = f32(f32(w * (factor[chunks[i // CHUNK][0]] / UNIT)) * v)
            num[i] = f32(num.get(i, 0.0) + scaled)
            contrib[i] = f32(contrib.get(i, 0.0) + w)
            heaviest[i] = max(heaviest.get(i, 0.0), w)
    least = {"contributors": lambda i: 1.0, "workers": lambda i: everyone,
             "floor": lambda i: max(2, 2 * heaviest[i]) if n > 1 else 1}[denominator]
    return {i: f32(num[i] / max(contrib[i], least(i))) for i in num}

def merge(theta, residual, admitted, denominator, alpha, chunks, revoked=None):
    """One round; revoked = (earlier admitted set, its alpha, positions gone before, now)."""
    theta, residual = list(theta), list(residual)
    if revoked:
        earlier, old_alpha, gone, now = revoked
        fewer = aggregate(earlier, denominator, chunks, gone + now)
        for i, a in aggregate(earlier, denominator, chunks, gone).items():
            residual[i] = f32(residual[i] + f32(old_alpha * f32(fewer.get(i, 0.0) - a)))
    for i, a in aggregate(admitted, denominator, chunks).items():
        residual[i] = f32(residual[i] + f32(alpha * a))
    payload, sent, residual = send(residual, chunks, "wide")
    for i, v in sent.items():
        theta[i] = f32(theta[i] - v)
    return theta, residual, payload

def golden():
    small, cases = chunks_of(SMALL), []

    def add_encodes(layout, head, error):
        for profile in PROFILES:
            payload, _, left = send(error, chunks_of(layout), profile)
            case = {"kind": "encode", "layout": "big" if layout is BIG else "small",
                    "profile": profile, **head}
            if layout is SMALL:
                case["payload"] = payload.hex()
            cases.append({**case, "payload_bytes": len(payload), "payload_fnv": fnv(payload),
                          "error_fnv": fnv(raw(left))})

    def add_round(head, admitted, after):
        theta, residual, payload = after
        cases.append({**head, "weights": [struct.pack(">f", w).hex() for w in admitted[1]],
                      "factors": [factor["a"] for factor in admitted[2]],
                      "factors_b": [factor["b"] for factor in admitted[2]],
                      "factors_d": [factor["d"] for factor in admitted[2]],
                      "broadcast_bytes": len(payload), "broadcast_fnv": fnv(payload),
                      "theta_fnv": fnv(raw(theta)), "residual_fnv": fnv(raw(residual))})
    for layout, seed in (BIG, 1), (BIG, 2), (SMALL, 1):
        add_encodes(layout, {"input": "drawn", "seed": seed}, drawn_error(seed, chunks_of(layout)))
    zeros = [0.0] * (CHUNK * len(small))
    real = [i for i in range(len(zeros)) if i % CHUNK < small[i // CHUNK][1]]
    special = {"zero": lambda i: 0.0, "tiny": lambda i: 2.0 ** -31,
               "large": lambda i: 1e6 if i == 1000 else 0.0,
               "ties": lambda i: 0.5 if i % 3 == 0 else -0.25}
    for name, value in special.items():
        start = list(zeros)
        for i in real:
            start[i] = value(i)
        add_encodes(SMALL, {"input": name}, error_of(start, zeros, zeros, f32(0.95)))

    five, three = [[send(drawn_error(seed, small), small, "standard")[0] for seed in seeds]
                   for seeds in (range(11, 16), range(21, 24))]
    tokens = [30000, 10000, 25000, 25000, 7]
    theta, residual = draw(9001, 2.0 ** -5, small), draw(9002, 2.0 ** -9, small)
    for denominator in "contributors", "floor", "workers":
        for rule in "mean", "median_norm":
            admitted = admit(five, tokens, rule, small)
            after = merge(theta, residual, admitted, denominator, f32(0.7), small)
            add_round({"kind": "merge", "denominator": denominator, "rule": rule}, admitted, after)
    effects = [-3, 90, -5, -4, -2]
    for denominator in "contributors", "floor", "workers":
        admitted = admit(five, tokens, "loss_gate", small, effects)
        after = merge(theta, residual, admitted, denominator, f32(0.7), small)
        add_round({"kind": "merge", "denominator": denominator, "rule": "loss_gate",
                   "effects": effects}, admitted, after)
    earlier = admit(five, tokens, "median_norm", small)
    now = admit(three, [9, 9, 9], "median_norm", small)
    for applied, gone, going in (False, [], [1]), (True, [], [1]), (True, [1], [3]), (True, [], [1, 3]):
        before = merge(theta, residual, earlier, "floor", 0.5, small)[:2]
        after = merge(*(before if applied else (theta, residual)), now, "floor", f32(0.7), small,
                      (earlier, 0.5, gone, going))
        add_round({"kind": "revocation", "denominator": "floor", "rule": "median_norm",
                   "earlier_round_applied": applied, "gone": gone, "going": going}, now, after)
    return json.dumps({"cases": cases}, indent=1) + "\n"

def main(args):
    if not args:
        sys.stdout.write(golden())
    elif len(args) != 2 or args[0] != "--check":
        sys.exit("usage: oracle.py [--check FILE]")
    else:
        with open(args[1], encoding="utf-8") as file:
            found, want = file.read().split("\n"), golden().split("\n")
        for line in range(max(len(found), len(want))):
            a, b = want[line:line + 1], found[line:line + 1]
            if a != b:
                sys.exit("%s differs at line %d: expected %s, found %s" % (args[1], line + 1, a, b))

if __name__ == "__main__":
    main(sys.argv[1:])
