"""Loads, stores, gathers and scatters of vectors; half precision is widened and rounded on the way.

Also single elements, atomic counters, and prefetches. Offsets and strides are bytes.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent._simd.half import ITEMSIZE, STORED, decode, encode
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import (
    BYTES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    NUMBA_SCALAR,
    SCALAR,
    WIDE,
    Ptr,
    Vec,
    call_llvm,
    lanes_of,
    pick,
)


def typed(builder, address, element):
    return builder.bitcast(address, element.as_pointer())


def _masked_name(ptr, lanes=LANES):
    element = STORED[ptr.storage]
    return f"v{lanes}{element if isinstance(element, ir.IntType) else ptr.storage}"


def _zeros(vector):
    return ir.Constant(vector, None)


def load_lanes(builder, ptr, address, lanes):
    vector = lanes_of(STORED[ptr.storage], lanes)
    return decode(builder, builder.load(typed(builder, address, vector), align=1), ptr)


@intrinsic
def load(typingctx, p):
    """Return the 16 contiguous elements at ``p``."""
    return Vec(p.kind)(p), lambda context, builder, sig, args: load_lanes(builder, p, args[0], LANES)


def load_lanes_masked(builder, ptr, address, mask, otherwise=None):
    """Return the elements where ``mask``, elsewhere ``otherwise``, given as stored bits, or 0."""
    lanes = mask.type.count
    vector = lanes_of(STORED[ptr.storage], lanes)
    name = f"llvm.masked.load.{_masked_name(ptr, lanes)}.p0"
    raw = call_llvm(builder, name, vector, [typed(builder, address, vector), I32(1), mask, otherwise or _zeros(vector)])
    x = decode(builder, raw, ptr)
    if ptr.kind == "i64":
        return x
    # LLVM 20 turns a masked load into a plain one if its lanes are selected by the same mask later on, and that reads past
    # the end of arrays. It does not look through a fence.
    return call_llvm(builder, f"llvm.arithmetic.fence.v{lanes}{ptr.kind}", x.type, [x])


@intrinsic
def load_masked(typingctx, p, mask):
    """Return the contiguous elements at ``p`` where ``mask``, else 0; nothing is read where it is false."""
    return Vec(p.kind)(p, mask), lambda context, builder, sig, args: load_lanes_masked(builder, p, *args)


def store_lanes(builder, ptr, address, x, mask=None):
    """Write the lanes where ``mask``, or all if it is None. Masked, that is one instruction with AVX-512, a dozen without."""
    raw = encode(builder, x, ptr, whole=mask is None)
    place = typed(builder, address, raw.type)
    if mask is None:
        builder.store(raw, place, align=1)
    else:
        name = f"llvm.masked.store.{_masked_name(ptr, raw.type.count)}.p0"
        call_llvm(builder, name, ir.VoidType(), [raw, place, I32(1), mask])


@intrinsic
def store(typingctx, p, x):
    """Write 16 contiguous elements at ``p``."""

    def codegen(context, builder, sig, args):
        store_lanes(builder, p, *args)
        return context.get_dummy_value()

    return types.void(p, x), codegen


@intrinsic
def store_each(typingctx, p, x, step):
    """Write the vectors that were concatenated into ``x``, ``step`` bytes from one to the next."""

    def codegen(context, builder, sig, args):
        base, wide, step = args
        for nth in range(x.lanes // LANES):
            raw = encode(builder, pick(builder, wide, wide, list(range(nth * LANES, (nth + 1) * LANES))), p)
            at = builder.gep(base, [builder.mul(step, I64(nth))])
            builder.store(raw, typed(builder, at, raw.type), align=1)
        return context.get_dummy_value()

    return types.void(p, x, types.int64), codegen


def _store_in_pieces(module, vector):
    """Return an LLVM function that writes the first n < 16 lanes as 8, 4, 2 and 1 lanes.

    Without AVX-512 a masked store takes a dozen cycles. The function is not inlined, for a kernel calls it in many places,
    where rows end, but in no loop over vectors.
    """
    name = f"store_first_{LANES}_{vector.element}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES, vector, I64]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    address, rest, n = function.args
    size = LANES // 2
    while size:
        low, high = (pick(builder, rest, rest, list(range(at, at + size))) for at in (0, size))
        wanted = builder.icmp_unsigned("!=", builder.and_(n, I64(size)), I64(0))
        with builder.if_then(wanted):
            builder.store(low, typed(builder, address, low.type), align=1)
        behind = builder.gep(typed(builder, address, low.type), [I64(1)], source_etype=low.type)
        address = builder.select(wanted, builder.bitcast(behind, BYTES), address)
        rest = builder.select(wanted, high, low)
        size //= 2
    builder.ret_void()
    return function


@intrinsic
def store_masked(typingctx, p, x, mask):
    """Write contiguous elements at ``p`` where ``mask``, which is true for the first lanes only; no other memory is touched."""

    def codegen(context, builder, sig, args):
        address, x, mask = args
        if WIDE:
            store_lanes(builder, p, address, x, mask)
            return context.get_dummy_value()
        raw = encode(builder, x, p)
        n = builder.zext(builder.ctpop(builder.bitcast(mask, I16)), I64)
        with builder.if_else(builder.icmp_unsigned("==", n, I64(LANES))) as (whole, part):
            with whole:
                builder.store(raw, typed(builder, address, raw.type), align=1)
            with part:
                builder.call(_store_in_pieces(builder.module, raw.type), [address, raw, n])
        return context.get_dummy_value()

    return types.void(p, x, mask), codegen


@intrinsic
def copy(typingctx, p, q):
    """Copy 16 contiguous elements from ``q`` to ``p``, as they are stored."""

    def codegen(context, builder, sig, args):
        to, at = (typed(builder, address, lanes_of(STORED[p.storage], LANES)) for address in args)
        builder.store(builder.load(at, align=1), to, align=1)
        return context.get_dummy_value()

    return types.void(p, q), codegen


@intrinsic
def copy_non_temporal(typingctx, p, q):
    """Do the same by a non-temporal store; ``p`` is aligned to the vector."""

    def codegen(context, builder, sig, args):
        to, at = (typed(builder, address, lanes_of(STORED[p.storage], LANES)) for address in args)
        _non_temporal(builder, builder.store(builder.load(at, align=1), to, align=LANES * ITEMSIZE[p.storage]))
        return context.get_dummy_value()

    return types.void(p, q), codegen


def _non_temporal(builder, written):
    written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@intrinsic
def store_non_temporal(typingctx, p, x):
    """Write 16 elements at ``p``, aligned to the vector, by a non-temporal store, for arrays that are not read again soon."""

    def codegen(context, builder, sig, args):
        raw = encode(builder, args[1], p)
        written = builder.store(raw, typed(builder, args[0], raw.type), align=LANES * ITEMSIZE[p.storage])
        _non_temporal(builder, written)
        return context.get_dummy_value()

    return types.void(p, x), codegen


def _lane_addresses(builder, base, offsets):
    addresses = builder.gep(base, [offsets], source_etype=I8)
    addresses.type = lanes_of(BYTES)  # a vector of offsets gives a vector of addresses; llvmlite does not infer that
    return addresses


@intrinsic
def scratch(typingctx, like, vectors):
    """Return uninitialized stack memory for ``vectors`` (a literal) vectors like ``like``."""
    if not isinstance(vectors, types.IntegerLiteral):
        return None
    place = ir.ArrayType(lanes_of(SCALAR[like.kind]), vectors.literal_value)

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            return builder.bitcast(builder.alloca(place), BYTES)

    return Ptr(like.kind, like.kind)(like, vectors), codegen


@intrinsic
def gather(typingctx, p, offsets, mask):
    """Return the elements at ``p + offsets`` bytes where ``mask``, else 0."""

    def codegen(context, builder, sig, args):
        vector = lanes_of(STORED[p.storage])
        addresses = _lane_addresses(builder, args[0], args[1])
        name = f"llvm.masked.gather.{_masked_name(p)}.v{LANES}p0"
        raw = call_llvm(builder, name, vector, [addresses, I32(1), args[2], _zeros(vector)])
        return decode(builder, raw, p)

    return Vec(p.kind)(p, offsets, mask), codegen


@intrinsic
def scatter(typingctx, p, offsets, x, mask):
    """Write lane by lane to ``p + offsets`` bytes where ``mask``."""

    def codegen(context, builder, sig, args):
        raw = encode(builder, args[2], p)
        addresses = _lane_addresses(builder, args[0], args[1])
        name = f"llvm.masked.scatter.{_masked_name(p)}.v{LANES}p0"
        call_llvm(builder, name, ir.VoidType(), [raw, addresses, I32(1), args[3]])
        return context.get_dummy_value()

    return types.void(p, offsets, x, mask), codegen


@intrinsic
def as_stored(typingctx, p, place):
    """Return the address ``place`` as a Ptr to elements like those at ``p``."""
    return p(p, place), lambda context, builder, sig, args: args[1]


def _element(is_fixed):
    @intrinsic
    def element(typingctx, p, offset):
        def codegen(context, builder, sig, args):
            raw = builder.load(typed(builder, builder.gep(args[0], [args[1]]), STORED[p.storage]), align=1)
            if is_fixed:
                raw.set_metadata("invariant.load", builder.module.add_metadata([]))
            return decode(builder, raw, p)

        return NUMBA_SCALAR[p.kind](p, types.int64), codegen

    return element


# Both return the element ``offset`` bytes after ``p`` as a scalar. ``fixed`` is for elements that no kernel writes, so LLVM may
# hoist the load out of a loop.
get, fixed = _element(False), _element(True)


@intrinsic
def put(typingctx, p, offset, value):
    """Write one element ``offset`` bytes after ``p``."""

    def codegen(context, builder, sig, args):
        raw = encode(builder, args[2], p)
        builder.store(raw, typed(builder, builder.gep(args[0], [args[1]]), raw.type), align=1)
        return context.get_dummy_value()

    return types.void(p, types.int64, NUMBA_SCALAR[p.kind]), codegen


@intrinsic
def fetch_max(typingctx, p, offset, value):
    """Raise an integer to ``value`` if it is less, and return its previous value, atomically."""

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("max", typed(builder, address, I64), args[2], "acq_rel")

    return types.int64(p, types.int64, types.int64), codegen


@intrinsic
def call(typingctx, function):
    """Call the C function at an address, which takes no arguments, and return its int."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(pointer, []), I64)

    return types.int64(function), codegen


@intrinsic
def call_kernel(typingctx, kernel, task, phase, me):
    """Run the kernel at an address."""

    def codegen(context, builder, sig, args):
        address, *rest = args
        pointer = builder.inttoptr(address, ir.FunctionType(ir.VoidType(), [BYTES, I64, I64]).as_pointer())
        builder.call(pointer, rest)
        return context.get_dummy_value()

    return types.void(types.int64, task, types.int64, types.int64), codegen


@intrinsic
def fetch_add(typingctx, task, slot, n):
    """Add n to an integer slot of the task and return its previous value, atomically (acquire-release)."""

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [builder.mul(args[1], I64(8))])
        return builder.atomic_rmw("add", typed(builder, address, I64), args[2], "acq_rel")

    return types.int64(task, types.int64, types.int64), codegen


@intrinsic
def read_slot(typingctx, task, slot):
    """Return an integer slot of the task (acquire): what other threads wrote before they changed it is visible from now on."""

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [builder.mul(args[1], I64(8))])
        return builder.load_atomic(typed(builder, address, I64), "acquire", align=8)

    return types.int64(task, types.int64), codegen


@intrinsic
def itemsize(typingctx, p):
    """Return the bytes of one stored element."""
    return types.int64(p), lambda context, builder, sig, args: I64(ITEMSIZE[p.storage])


@intrinsic
def address(typingctx, p):
    """Return the address in ``p`` as an integer."""
    return types.int64(p), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


@inlined
def before_aligned(p, n):
    """Return how many of the n elements at ``p`` come before the first aligned vector, which a non-temporal store needs."""
    return min(n, (-address(p)) % (LANES * itemsize(p)) // itemsize(p))


def emit_prefetch(builder, address, level=1, writes=False):
    """Emit a prefetch of the cache line at ``address`` into the cache of this level."""
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [address, I32(int(writes)), I32(4 - level), I32(1)])


def _prefetch(level, writes=False):
    @intrinsic
    def prefetch(typingctx, p, offset):
        def codegen(context, builder, sig, args):
            emit_prefetch(builder, builder.gep(args[0], [args[1]]), level, writes)
            return context.get_dummy_value()

        return types.void(p, types.int64), codegen

    return prefetch


# Prefetch the cache line ``offset`` bytes after ``p``: ``near`` into the first-level cache, else the second; never faults.
prefetch_near, prefetch = _prefetch(1), _prefetch(2)
prefetch_to_write = _prefetch(1, writes=True)
