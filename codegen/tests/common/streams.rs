//! Streamed folds as kernels, for the tests of every device.

use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{SplitMix, parse};
use proptest::prelude::*;

/// A kernel whose body is given in the text format, without its first and last line.
pub(crate) fn stream(name: &str, body: &str) -> Kernel {
    let text = format!("module test entry @{name}\n\nfunc @{name} {{\n{body}\n}}\n");
    let module = parse("test", &text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
    Kernel { name: name.to_owned(), kind: KernelKind::Stream, body: module.functions[0].clone() }
}

/// Attention over a cache of latents, which are keys and values both: `i` heads of the tokens `t`, latents of width `c`, keys that
/// all heads share of width `r`. Run-time sizes: batch, tokens, positions.
pub(crate) fn latent(name: &str, dtype: &str, [i, c, r]: [u64; 3]) -> Kernel {
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, c={c}, r={r}, s=n2\n\
             param q: {dtype}[b, t, i, c]\nparam qr: {dtype}[b, t, i, r]\nparam kv: {dtype}[s, b, c]\n\
             param kr: {dtype}[s, b, r]\nparam pos: i32[b, t]\n\
             at: i32[s] = position of s\nseen: bool[s, b, t] = le at, pos\n\
             zc: f32[b, t, i, s] = contract q, kv over c\nzr: f32[b, t, i, s] = contract qr, kr over r\n\
             z: f32[b, t, i, s] = add zc, zr\nscale: f32 = const 0.125\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n\
             p: {dtype}[b, t, i, s] = softmax m over s\ny: {dtype}[b, t, i, c] = contract p, kv over s\nreturn y"
        ),
    )
}

/// Where positions lie in a pool of pages, by the table `table: i32[b, w]`.
fn slots(positions: &str, axes: &str, page: u64) -> String {
    format!(
        "size: i32 = const {page}\nnumber: i32[{axes}] = div {positions}, size\n\
         place: i32[b, {axes}] = gather table, number along w\nfirst: i32[b, {axes}] = mul place, size\n\
         before: i32[{axes}] = mul number, size\nwithin: i32[{axes}] = sub {positions}, before\n\
         slot: i32[b, {axes}] = add first, within\n"
    )
    .replace("i32[b, b, t]", "i32[b, t]")
}

/// The same over a cache in pages. Run-time sizes: those that [`pages`] gives.
pub(crate) fn paged(name: &str, dtype: &str, [i, c, r]: [u64; 3], page: u64) -> Kernel {
    let slots = slots("at", "s", page);
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, c={c}, r={r}, s=n2, u=n3, w=n4\n\
             param q: {dtype}[b, t, i, c]\nparam qr: {dtype}[b, t, i, r]\nparam kvs: {dtype}[u, c]\n\
             param krs: {dtype}[u, r]\nparam pos: i32[b, t]\nparam table: i32[b, w]\n\
             at: i32[s] = position of s\n{slots}\
             kv: {dtype}[s, b, c] = gather kvs, slot along u\nkr: {dtype}[s, b, r] = gather krs, slot along u\n\
             seen: bool[s, b, t] = le at, pos\n\
             zc: f32[b, t, i, s] = contract q, kv over c\nzr: f32[b, t, i, s] = contract qr, kr over r\n\
             z: f32[b, t, i, s] = add zc, zr\nscale: f32 = const 0.125\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n\
             p: {dtype}[b, t, i, s] = softmax m over s\ny: {dtype}[b, t, i, c] = contract p, kv over s\nreturn y"
        ),
    )
}

/// The same over latents alone, in codes of 8 bits with a scale for each `group` of them. Run-time sizes: those that [`pages`] gives.
pub(crate) fn paged_codes(name: &str, [i, c, group]: [u64; 3], page: u64) -> Kernel {
    let (slots, groups, words) = (slots("at", "s", page), c / group, group / 4);
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, c={c}, s=n2, u=n3, w=n4, g={groups}, h={words}, f=4, k={group}\n\
             param q: bf16[b, t, i, c]\nparam codes: i32[u, g, h]\nparam scales: bf16[u, g]\n\
             param pos: i32[b, t]\nparam table: i32[b, w]\nat: i32[s] = position of s\n{slots}\
             word: i32[s, b, g, h] = gather codes, slot along u\nfield: i32[b, s, g, h, f] = unpack word over f\n\
             code: i32[b, s, g, k] = merge field axes h, f into k\nnone: i32 = const 127\n\
             less: i32[b, s, g, k] = sub code, none\nwide: f32[b, s, g, k] = cast less\n\
             of: bf16[s, b, g] = gather scales, slot along u\ndecoded: bf16[b, s, g, k] = mul wide, of\n\
             kv: bf16[b, s, c] = merge decoded axes g, k into c\nseen: bool[s, b, t] = le at, pos\n\
             z: f32[b, t, i, s] = contract q, kv over c\nleast: f32 = const -inf\n\
             m: f32[b, t, i, s] = select seen, z, least\np: bf16[b, t, i, s] = softmax m over s\n\
             y: f32[b, t, i, c] = contract p, kv over s\nreturn y"
        ),
    )
}

/// Attention of heads over keys and values in pages, whose tokens count from 0. Run-time sizes: those that [`pages`] gives.
pub(crate) fn paged_heads(name: &str, dtype: &str, [i, k, v]: [u64; 3], page: u64) -> Kernel {
    let slots = slots("at", "s", page);
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, v={v}, s=n2, k={k}, u=n3, w=n4\n\
             param q: {dtype}[b, t, i, k]\nparam keys: {dtype}[u, i, k]\nparam values: {dtype}[u, i, v]\n\
             param table: i32[b, w]\nto: i32[t] = position of t\nat: i32[s] = position of s\n{slots}\
             key: {dtype}[s, b, i, k] = gather keys, slot along u\nvalue: {dtype}[s, b, i, v] = gather values, slot along u\n\
             seen: bool[t, s] = le at, to\n\
             z: f32[b, t, i, s] = contract q, key over k\nscale: f32 = const 0.125\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n\
             w1: f32[b, t, i, s] = softmax m over s\np: {dtype}[b, t, i, s] = cast w1\n\
             y: {dtype}[b, t, i, v] = contract p, value over s\nreturn y"
        ),
    )
}

/// What a product makes of tokens, put where a table of pages says. Run-time sizes: batch, tokens, slots, pages.
pub(crate) fn put(name: &str, dtype: &str, [c, d]: [u64; 2], page: u64) -> Kernel {
    let mut kernel = stream(
        name,
        &format!(
            "axes b=n0, t=n1, c={c}, d={d}, u=n2, w=n3\nparam x: {dtype}[b, t, d]\nparam m: {dtype}[c, d]\n\
             param pos: i32[b, t]\nparam table: i32[b, w]\ncache pool: {dtype}[u, c]\n{}\
             y: {dtype}[b, t, c] = contract m, x over d\nz: {dtype}[u, c] = append pool, y, slot from t to u\nreturn z",
            slots("pos", "b, t", page)
        ),
    );
    // Of a kernel, what is appended to is the first parameter.
    let cache = kernel.body.caches.remove(0);
    kernel.body.params.insert(0, cache);
    kernel.kind = KernelKind::of(&kernel.body);
    kernel
}

/// Sizes of kernels over so many sequences, tokens and positions in pages: those, slots of the pool and pages of the table. More than
/// are needed.
pub(crate) fn pages([b, t, s]: [usize; 3], page: u64) -> Vec<usize> {
    let pages = s.div_ceil(page as usize) + 1;
    vec![b, t, s, (b * pages + 1) * page as usize, pages]
}

/// Attention of as many heads of queries as of keys, causal by the positions in the sequence. Run-time sizes: batch, tokens, positions.
pub(crate) fn causal(name: &str, dtype: &str, [i, k, v]: [u64; 3]) -> Kernel {
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, v={v}, s=n2, k={k}\n\
             param q: {dtype}[b, t, i, k]\nparam key: {dtype}[b, s, i, k]\nparam value: {dtype}[b, s, i, v]\n\
             param scale: f32[i]\nto: i32[t] = position of t\nat: i32[s] = position of s\nseen: bool[t, s] = le at, to\n\
             z: f32[b, t, i, s] = contract q, key over k\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n\
             w: f32[b, t, i, s] = softmax m over s\np: {dtype}[b, t, i, s] = cast w\n\
             y: {dtype}[b, t, i, v] = contract p, value over s\nreturn y"
        ),
    )
}

/// One of the sums in the gradient of [`causal`]: of keys, along the tokens. Weights are made of two products, and of what is known of
/// each token: the logarithm of the sum of exponentials ([`total`]), the mean of the adjoints. Run-time sizes: batch, tokens, positions.
pub(crate) fn backward(name: &str, dtype: &str, [i, k, v]: [u64; 3]) -> Kernel {
    stream(
        name,
        &format!(
            "axes b=n0, s=n1, i={i}, k={k}, t=n2, v={v}\n\
             param q: {dtype}[b, t, i, k]\nparam key: {dtype}[b, s, i, k]\nparam value: {dtype}[b, s, i, v]\n\
             param dy: {dtype}[b, t, i, v]\nparam total: f32[b, t, i]\nparam mean: f32[b, t, i]\n\
             to: i32[t] = position of t\nat: i32[s] = position of s\nseen: bool[t, s] = le at, to\n\
             z: f32[b, t, i, s] = contract q, key over k\nscale: f32 = const 0.125\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n\
             zero: f32 = const 0.0\nlow: f32[b, t, i, s] = sub m, total\np: {dtype}[b, t, i, s] = exp low\n\
             dp: f32[b, t, i, s] = contract dy, value over v\n\
             c: f32[b, t, i, s] = sub dp, mean\nw: f32[b, t, i, s] = mul p, c\nh: f32[b, t, i, s] = select seen, w, zero\n\
             g: f32[b, t, i, s] = mul h, scale\ny: f32[b, s, i, k] = contract g, q over t\nreturn y"
        ),
    )
}

/// For each row of [`causal`], the logarithm of the sum of its exponentials. Run-time sizes: batch, tokens, positions.
pub(crate) fn total(name: &str, dtype: &str, [i, k]: [u64; 2]) -> Kernel {
    let ty = |dtype: &str, axes: &[&str]| format!("{dtype}[{}]", axes.join(", "));
    stream(
        name,
        &format!(
            "axes b=n0, t=n1, i={i}, s=n2, k={k}\nparam q: {dtype}[b, t, i, k]\nparam key: {dtype}[b, s, i, k]\n\
             to: i32[t] = position of t\nat: i32[s] = position of s\nseen: bool[t, s] = le at, to\n\
             z: f32[b, t, i, s] = contract q, key over k\nscale: f32 = const 0.125\nx: f32[b, t, i, s] = mul z, scale\n\
             least: f32 = const -inf\nm: f32[b, t, i, s] = select seen, x, least\n{}\nreturn total",
            logarithm("m", &["b", "t", "i"], &["b", "t", "i", "s"], ty)
        ),
    )
}

/// The logarithm `total` of the sum of exponentials of a value along `s`; where that is nothing but -inf, the least float.
fn logarithm(of: &str, row: &[&str], all: &[&str], mut ty: impl FnMut(&str, &[&str]) -> String) -> String {
    let mut lines = vec![
        "bottom: f32 = const -3.4028234663852886e38\nnil: f32 = const 0.0\none: f32 = const 1.0".to_owned(),
    ];
    for (name, dtype, axes, op) in [
        ("top", "f32", row, format!("reduce_max {of} over s")),
        ("bound", "f32", row, "max top, bottom".to_owned()),
        ("shifted", "f32", all, format!("sub {of}, bound")),
        ("e", "f32", all, "exp shifted".to_owned()),
        ("sum", "f32", row, "reduce_sum e over s".to_owned()),
        ("empty", "bool", row, "eq sum, nil".to_owned()),
        ("divisor", "f32", row, "select empty, one, sum".to_owned()),
        ("log", "f32", row, "log divisor".to_owned()),
        ("total", "f32", row, "add log, bound".to_owned()),
    ] {
        lines.push(format!("{name}: {} = {op}", ty(dtype, axes)));
    }
    lines.join("\n")
}

/// What a random stream is made of.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// What is folded, and how.
    by: By,
    /// Decides the order of axes.
    order: u64,
    /// Where the mask comes from; there may be none.
    mask: u8,
    /// How keys follow from parameters.
    keys: u8,
    /// Keys are the values too.
    shared: bool,
    /// There is a second product in the scores.
    two: bool,
    /// What becomes of the product.
    epilogue: u8,
    /// The axes `g` and `h` are the values' too.
    batch: [bool; 2],
}

/// How scores are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// They are the logarithms of weights.
    Softmax,
    /// They weigh a sum.
    Scores,
    /// Their exponentials do.
    Exponentials,
    /// They do, each less the product of another operand with the values.
    Twice,
    /// They are added up.
    Sum,
    /// The largest is taken.
    Max,
    /// The logarithm of the sum of their exponentials is.
    Total,
}

/// Any softmax.
pub(crate) fn arb_case() -> impl Strategy<Value = Case> {
    arb(Just(By::Softmax))
}

/// Any other fold.
pub(crate) fn arb_fold() -> impl Strategy<Value = Case> {
    arb(prop::sample::select(vec![By::Scores, By::Exponentials, By::Twice, By::Sum, By::Max, By::Total]))
}

fn arb(by: impl Strategy<Value = By>) -> impl Strategy<Value = Case> {
    let flags = (any::<bool>(), any::<bool>(), any::<[bool; 2]>());
    (by, any::<u64>(), 0u8..5, 0u8..6, 0u8..4, flags).prop_map(|(by, order, mask, keys, epilogue, flags)| {
        let (shared, two, batch) = flags;
        Case { by, order, mask, keys, epilogue, shared, two, batch }
    })
}

impl Case {
    /// The kernel. Run-time sizes: batch `b`, tokens `t`, positions `s`.
    pub(crate) fn kernel(&self) -> Kernel {
        self.of("f32")
    }

    /// The same with operands of that dtype.
    pub(crate) fn of(&self, operands: &str) -> Kernel {
        let mut rng = SplitMix(self.order);
        let mut ty = |dtype: &str, axes: &[&str]| {
            let mut axes: Vec<_> = axes.iter().map(|a| (rng.next_u64(), *a)).collect();
            axes.sort_unstable();
            let axes: Vec<_> = axes.into_iter().map(|a| a.1).collect();
            format!("{dtype}[{}]", axes.join(", "))
        };
        let mut params = Vec::new();
        let mut body = Vec::new();
        let with = |mut axes: Vec<&'static str>| {
            ["g", "h"].iter().zip(self.batch).filter(|b| b.1).for_each(|(a, _)| axes.push(a));
            axes
        };
        let rows = ["b", "g", "h", "t", "s"];
        params.push(format!("q: {}", ty(operands, &["b", "g", "h", "t", "c"])));
        // The streamed axis of a key may have another name where it is kept.
        let (kept, dtype) = if self.keys == 2 {
            ("u", operands)
        } else {
            ("s", if self.keys == 5 && operands == "f32" { "bf16" } else { operands })
        };
        let key = with(vec!["b", "c"]);
        let of = |width: &'static str, at: &'static str| {
            let mut axes: Vec<_> = key.iter().map(|&a| if a == "c" { width } else { a }).collect();
            axes.push(at);
            axes
        };
        match self.keys {
            0 | 5 => params.push(format!("k: {}", ty(dtype, &of("c", "s")))),
            1 => {
                params.push(format!("k0: {}", ty(operands, &of("c", "s"))));
                params.push(format!("ks: {}", ty(operands, &["s", "b"])));
                body.push(format!("k: {} = mul k0, ks", ty(operands, &of("c", "s"))));
            }
            2 => {
                params.push(format!("k0: {}", ty(operands, &of("c", kept))));
                body.push(format!("k: {} = rename k0 from u to s", ty(operands, &of("c", "s"))));
            }
            3 => {
                params.push(format!("k0: {}", ty(operands, &of("c1", "s"))));
                params.push(format!("k1: {}", ty(operands, &of("c2", "s"))));
                body.push(format!("k: {} = concat k0, k1 axes c1, c2 into c", ty(operands, &of("c", "s"))));
            }
            _ => {
                params.push(format!("k0: {}", ty(operands, &of("w", "s"))));
                params.push("place: i32[s, b]".to_owned());
                params.push("freq: f32[j]".to_owned());
                body.push(format!("k2: {} = slice k0 axis w into c start 2", ty(operands, &of("c", "s"))));
                body.push(format!(
                    "k: {} = rope k2, place, freq over c pairs halves",
                    ty(operands, &of("c", "s"))
                ));
            }
        }
        body.push(format!("z0: {} = contract q, k over c", ty("f32", &rows)));
        let mut x = "z0";
        if self.two {
            params.push(format!("q2: {}", ty(operands, &["h", "t", "r", "b"])));
            params.push(format!("kr: {}", ty(operands, &["b", "s", "r"])));
            body.push(format!("z1: {} = contract kr, q2 over r", ty("f32", &["b", "h", "t", "s"])));
            body.push(format!("z2: {} = add z0, z1", ty("f32", &rows)));
            x = "z2";
        }
        // Exponentials of large numbers would be all that there is of a sum.
        let scale = if self.by == By::Exponentials { 0.03125 } else { 0.5 };
        body.push(format!("half: f32 = const {scale}\nz3: {} = mul {x}, half", ty("f32", &rows)));
        let zero = matches!(self.by, By::Scores | By::Twice | By::Sum);
        let nothing = if zero { "0.0" } else { "-inf" };
        body.push(format!("least: f32 = const {nothing}\nat: i32[s] = position of s"));
        match self.mask {
            0 => {}
            1 => {
                params.push("pos: i32[b, t]".to_owned());
                body.push(format!("seen: {} = le at, pos", ty("bool", &["b", "t", "s"])));
            }
            2 => params.push(format!("seen: {}", ty("bool", &["b", "t", "s"]))),
            3 => body.push("to: i32[t] = position of t\nseen: bool[s, t] = le at, to".to_owned()),
            _ => body.push("to: i32 = const -1\nseen: bool[s] = lt at, to".to_owned()),
        }
        let x = if self.mask == 0 { "z3" } else { "z4" };
        if self.mask > 0 {
            body.push(format!("z4: {} = select seen, z3, least", ty("f32", &rows)));
        }
        let (value, width) = if self.shared { ("k", "c") } else { ("val", "v") };
        let weighs = !matches!(self.by, By::Sum | By::Max | By::Total);
        if weighs && !self.shared {
            params.push(format!("val: {}", ty(operands, &of("v", "s"))));
        }
        match self.by {
            By::Softmax => body.push(format!("w: {} = softmax {x} over s", ty("f32", &rows))),
            By::Scores | By::Sum | By::Max | By::Total => {
                params.push(format!("share: {}", ty("f32", &["t", "g"])));
                let op = if matches!(self.by, By::Max | By::Total) { "sub" } else { "mul" };
                body.push(format!("w: {} = {op} {x}, share", ty("f32", &rows)));
            }
            By::Exponentials => {
                params.push(format!("share: {}", ty("f32", &["h", "t"])));
                body.push(format!("w0: {} = sub {x}, share", ty("f32", &rows)));
                body.push(format!("w: {} = exp w0", ty("f32", &rows)));
            }
            By::Twice => {
                params.push(format!("dy: {}", ty(operands, &["b", "g", "h", "t", width])));
                params.push(format!("mean: {}", ty("f32", &["b", "g", "h", "t"])));
                body.push(format!("dp: {} = contract {value}, dy over {width}", ty("f32", &rows)));
                body.push(format!("dp1: {} = sub dp, mean", ty("f32", &rows)));
                body.push(format!("w: {} = mul dp1, {x}", ty("f32", &rows)));
            }
        }
        body.push(format!("p: {} = cast w", ty("f32", &rows)));
        let result = if weighs { vec!["b", "g", "h", "t", width] } else { vec!["b", "g", "h", "t"] };
        let fold = match self.by {
            By::Sum => "reduce_sum p over s".to_owned(),
            By::Max => "reduce_max p over s".to_owned(),
            By::Softmax | By::Scores | By::Exponentials | By::Twice => format!("contract p, {value} over s"),
            By::Total => {
                body.push(logarithm("p", &result, &rows, &mut ty));
                "cast total".to_owned()
            }
        };
        body.push(format!("y: {} = {fold}", ty("f32", &result)));
        let last = match self.epilogue {
            0 => "y",
            // Twice the least float is none.
            1 if self.by != By::Total => {
                let gate = if weighs { vec!["t", width] } else { vec!["t"] };
                params.push(format!("gate: {}", ty("f32", &gate)));
                body.push(format!("y1: {} = mul y, gate", ty("f32", &result)));
                "y1"
            }
            2 => {
                body.push(format!(
                    "y1: {} = silu y\ny2: {} = cast y1",
                    ty("f32", &result),
                    ty("f32", &result)
                ));
                "y2"
            }
            _ if !weighs => "y",
            _ => {
                body.push(format!("y1: {} = add y, q3", ty("f32", &result)));
                params.push(format!("old: {}", ty("f32", &["b", "t", "x", "g", "h"])));
                let from = if self.shared { 1 } else { 0 };
                let part = ty("f32", &result);
                body.insert(0, format!("q3: {part} = slice old axis x into {width} start {from}"));
                "y1"
            }
        };
        let params: Vec<_> = params.iter().map(|p| format!("param {p}")).collect();
        stream(
            "random",
            &format!(
                "axes b=n0, t=n1, s=n2, u=n2, g=2, h=3, c=6, c1=2, c2=4, w=9, j=3, r=5, v=7, x=8\n{}\n{}\nreturn {last}",
                params.join("\n"),
                body.join("\n")
            ),
        )
    }
}
