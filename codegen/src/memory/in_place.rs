//! What may be written where something else was that is not needed any more.

use std::collections::BTreeSet;

use latentc_ir::{Inst, Op, Type};

use super::Layout;
use crate::map::MapPlan;
use crate::program::{BufferId, Kernel, KernelKind, Program, Step};

/// The parameters whose place the result of a kernel may take on a device: those whose elements are of the result's kind and length,
/// laid out like it, that an element of the result needs at its own index only. Every other reader of that element would come too late, so all that is
/// computed from the parameter must be elementwise, or folds of the row that the element is in: whoever walks a row has folded all of it
/// before the first element is written, and nobody else reads it.
pub fn in_place(kernel: &Kernel, layout: &Layout) -> Vec<usize> {
    let body = &kernel.body;
    let &[result] = &body.results[..] else { return Vec::new() };
    if !layout.in_place
        || kernel.kind != KernelKind::Map
        || body.body.iter().any(|i| matches!(i.op, Op::Append { .. }))
    {
        return Vec::new();
    }
    let rows: Option<BTreeSet<_>> = MapPlan::of(body).rows.map(|rows| rows.into_iter().collect());
    let is_fold = |inst: &Inst| matches!(inst.op, Op::Reduce { .. });
    let in_row = |inst: &Inst| Some(body.ty(inst.result()).axes.iter().copied().collect()) == rows;
    if !body.body.iter().filter(|i| is_fold(i)).all(in_row) {
        return Vec::new();
    }
    let elementwise = |op: &Op| matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast);
    let like = |a: &Type, b: &Type| {
        let floats = a.dtype.is_float() && b.dtype.is_float();
        let same = a.dtype == b.dtype || floats && (layout.bytes)(a.dtype) == (layout.bytes)(b.dtype);
        same && a.axes == b.axes
    };
    let fits = |n: &usize| {
        let param = body.params[*n];
        let mut from = BTreeSet::from([param]);
        like(body.ty(param), body.ty(result))
            && body.body.iter().all(|inst| {
                let reads = inst.args.iter().any(|a| from.contains(a));
                // What is folded is there before anything is written.
                if reads && !is_fold(inst) {
                    from.extend(&inst.results);
                }
                !reads || elementwise(&inst.op) || is_fold(inst)
            })
    };
    (0..body.params.len()).filter(fits).collect()
}

/// Whether a program may write its results, in order, where these of its parameters are: each is written by a launch that may work
/// [in place](in_place) of the parameter, which nothing reads at the same time or later.
pub fn may_replace(program: &Program, params: &[usize], layout: &Layout) -> bool {
    let Some(entry) = program.routine(&program.entry) else { return false };
    let replaces = |(result, &n): (&BufferId, &usize)| {
        let Some(param) = entry.params.get(n) else { return false };
        let writes = |step: &Step| step.outputs().contains(result);
        let works = |step: &Step| match step {
            Step::Launch { kernel, inputs, .. } => {
                let places = in_place(&program.kernels[*kernel], layout);
                let at: Vec<_> = (0..inputs.len()).filter(|&i| inputs[i] == *param).collect();
                at.len() == 1 && places.contains(&at[0])
            }
            Step::Call { .. } => false,
        };
        let groups: Vec<_> = entry.groups().collect();
        let Some(first) = groups.iter().position(|group| group.iter().any(writes)) else { return false };
        let late = groups[first..].iter().flat_map(|group| group.iter());
        late.filter(|step| writes(step) || step.inputs().contains(param))
            .all(|step| writes(step) && works(step))
    };
    let once = params.iter().enumerate().all(|(i, n)| !params[..i].contains(n));
    once && params.len() == entry.results.len() && entry.results.iter().zip(params).all(replaces)
}

#[cfg(test)]
mod tests {
    use latentc_ir::{DType, Size};

    use super::*;
    use crate::program::{Buffer, Role, Routine, parsed};

    const LAYOUT: Layout = Layout {
        align: 4,
        page: 1 << 40,
        bytes: |d: DType| d.bytes(),
        kept: |d: DType| d.bytes(),
        in_place: true,
    };

    #[test]
    fn only_what_is_read_at_its_own_index_is_written_over() {
        let on = |layout: &Layout, text: &str| {
            in_place(&parsed(KernelKind::Map, &format!("  axes a=3, b=4, c=4\n{text}")), layout)
        };
        let replaced = |text: &str| on(&LAYOUT, text);
        let params = "  param p: f32[a=3, b=4]\n  param q: f32[b=4]\n  param r: f32[b=4, a=3]\n  param n: bf16[a=3, b=4]\n\n";
        let sum =
            "  x: f32[a=3, b=4] = add p, q\n  z: f32[a=3, b=4] = mul x, r\n  y: f32[a=3, b=4] = add z, n\n";
        // q is read by several elements, r lies in another order, n has shorter elements where these have a length of their own.
        assert_eq!(replaced(&format!("{params}{sum}")), [0]);
        assert_eq!(on(&Layout { bytes: |_| 4, ..LAYOUT }, &format!("{params}{sum}")), [0, 3]);
        assert_eq!(on(&Layout { in_place: false, ..LAYOUT }, &format!("{params}{sum}")), [0; 0]);
        let turned = "  x: f32[a=3, c=4] = rename p from b to c\n  z: f32[a=3, b=4] = rename x from c to b\n";
        assert_eq!(replaced(&format!("{params}{turned}  y: f32[a=3, b=4] = add z, q\n")), [0; 0]);
        // A row is folded before it is written; where a fold goes across rows, others come too late.
        let row = "  s: f32[a=3] = reduce_sum p over b\n  y: f32[a=3, b=4] = div p, s\n";
        assert_eq!(replaced(&format!("{params}{row}")), [0]);
        let twice = "  m: f32[a=3] = reduce_max p over b\n  z: f32[a=3, b=4] = sub p, m\n  s: f32[a=3] = reduce_sum z over b\n  \
                     y: f32[a=3, b=4] = div z, s\n";
        assert_eq!(replaced(&format!("{params}{twice}")), [0]);
        let across = "  s: f32[a=3] = reduce_sum p over b\n  t: f32[b=4] = reduce_sum p over a\n  z: f32[a=3, b=4] = div p, s\n  \
                      y: f32[a=3, b=4] = div z, t\n";
        assert_eq!(replaced(&format!("{params}{across}")), [0; 0]);
    }

    /// The launches of `m = g * m` and of `p = p + m`, the second time of what `m` was, in a program that returns both.
    fn steps(reads: &str) -> Program {
        let map = |op: &str| {
            let text = format!("  axes t\n  param x: f32[t]\n  param z: f32[t]\n\n  y: f32[t] = {op} x, z\n");
            parsed(KernelKind::Map, &text)
        };
        let names = ["p", "g", "m", "m.next", "p.next"];
        let id = |name: &str| BufferId(names.iter().position(|n| *n == name).expect("a name") as u32);
        let size = || vec![Size::Sym("t".to_owned())];
        let buffer = |name: &&str| Buffer {
            name: (*name).to_owned(),
            dtype: DType::F32,
            dims: size(),
            role: if name.ends_with("next") { Role::Temp } else { Role::Param },
        };
        let launch = |kernel, inputs: [&str; 2], output| Step::Launch {
            kernel,
            inputs: inputs.map(id).to_vec(),
            output: id(output),
            sizes: size(),
            beside: false,
            origins: Vec::new(),
        };
        let routine = Routine {
            name: "f".to_owned(),
            buffers: names.iter().map(buffer).collect(),
            params: ["p", "g", "m"].map(id).to_vec(),
            results: ["p.next", "m.next"].map(id).to_vec(),
            steps: vec![launch(0, ["g", "m"], "m.next"), launch(1, ["p", reads], "p.next")],
        };
        let kernels = vec![map("mul"), map("add")];
        Program { name: "m".to_owned(), kernels, routines: vec![routine], entry: "f".to_owned(), pool: None }
    }

    #[test]
    fn results_replace_what_nobody_reads_later() {
        let on = |program: &Program, params: &[usize]| may_replace(program, params, &LAYOUT);
        let new = steps("m.next");
        assert!(on(&new, &[0, 2]) && on(&new, &[0, 1]));
        // Not two results in one place, not one in the place of what its launch does not read, and all or none of them.
        assert!(!on(&new, &[2, 2]) && !on(&new, &[2, 0]) && !on(&new, &[0]) && !on(&new, &[0, 3]));
        assert!(!may_replace(&new, &[0, 2], &Layout { in_place: false, ..LAYOUT }));
        let old = steps("m");
        assert!(!on(&old, &[0, 2]) && on(&old, &[0, 1]));
        // Nor in the place of what a launch reads that may run at the same time.
        let mut beside = steps("g");
        assert!(!on(&beside, &[0, 1]) && on(&beside, &[0, 2]));
        beside.routines[0].steps.swap(0, 1);
        assert!(on(&beside, &[0, 1]));
        let Step::Launch { beside: mark, .. } = &mut beside.routines[0].steps[1] else { panic!("a launch") };
        *mark = true;
        assert!(!on(&beside, &[0, 1]));
    }
}
