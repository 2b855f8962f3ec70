//! The launches that a kernel in one of its ways comes to on a device.
//!
//! Mostly that is one. A product on tensor cores wants operands that lie in memory, one operand of few columns for all of its products, and
//! of a grouped one rows in the order of their groups. What does not come so is made by launches before, and what is made of it
//! by one after; all of these are kernels with bodies of their own, cut out of the kernel's:
//!
//! - an operand that is an expression, such as a normed row, is stored by a map, and so are the elements of what is held as codes;
//! - rows are sorted by their index ([`sort`](super::sort));
//! - where an index is summed over (the experts of one token), products have different operands, or what is summed is cut into parts so
//!   that there are more tiles, each product is stored in f32, with what is still to be summed, and a map does that and makes the result.
//!
//! What lies in between belongs to the device.

use std::collections::BTreeSet;

use latentc_ir::{DType, Function, Op, Reduce, Size, Type, ValueId};

use super::kernel::CubeIr;
use super::matrix;
use super::scatter_matrix::OuterPlan;
use super::shape::LaunchShape;
use super::sort;
use super::split::Role;
use super::target::Target;
use crate::coded::decode;
use crate::contract::ContractPlan;
use crate::device::DeviceError;
use crate::few::FewPlan;
use crate::program::{Kernel, KernelKind};
use crate::scatter::ScatterPlan;

/// What a launch reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// A parameter of the whole kernel: its number among those that are read.
    Param(usize),
    /// What lies in between.
    Kept(usize),
    /// The result of the whole kernel.
    Output,
}

/// Something that lies between launches.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kept {
    /// A value.
    Value(DType, Vec<Size>),
    /// The rows of these axes by groups, of which there are so many.
    Order(Vec<Size>, usize),
}

impl Kept {
    fn value(body: &Function, ty: &Type) -> Kept {
        Kept::Value(ty.dtype, sizes(body, ty))
    }

    /// Its elements, for the number behind each run-time size.
    pub(crate) fn elements(&self, number: impl Fn(&str) -> usize) -> (DType, usize) {
        let extent = |size: &Size| match size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => number(s),
        };
        let total = |sizes: &[Size]| sizes.iter().map(extent).product::<usize>();
        match self {
            Kept::Value(dtype, sizes) => (*dtype, total(sizes)),
            Kept::Order(sizes, groups) => (DType::I32, sort::kept(total(sizes), *groups)),
        }
    }
}

/// The parameters that a kernel reads.
fn read(body: &Function) -> impl Iterator<Item = ValueId> + '_ {
    body.params.iter().copied().filter(|&p| CubeIr::reads(body, p))
}

fn sizes(body: &Function, ty: &Type) -> Vec<Size> {
    ty.axes.iter().map(|&a| body.axis(a).size.clone()).collect()
}

/// One of the launches. Its kernel has the axes of the whole one, and so the same run-time sizes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stage {
    /// What is computed.
    pub(crate) kernel: Kernel,
    /// Which of the kernels with that body.
    pub(crate) role: Role,
    /// The buffers that it reads, in its order, and the one that it writes.
    pub(crate) inputs: Vec<Operand>,
    pub(crate) output: Operand,
}

impl Stage {
    /// How it is launched.
    pub(crate) fn shape(&self, target: Target) -> LaunchShape {
        LaunchShape::of_role(&self.kernel, self.role, target)
    }

    /// How it is written.
    ///
    /// # Errors
    /// If it cannot be.
    pub(crate) fn ir(&self, target: Target) -> Result<CubeIr, DeviceError> {
        Ok(CubeIr::new(&self.kernel, target)?.of_role(self.role))
    }
}

/// All launches of a kernel, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stages {
    pub(crate) kept: Vec<Kept>,
    pub(crate) all: Vec<Stage>,
}

impl Stages {
    /// Those of a kernel in the way that its kind says.
    pub(crate) fn of(kernel: &Kernel) -> Stages {
        match kernel.kind {
            KernelKind::Matrix { wide, parts, .. } => {
                Stages::of_matrix(kernel, wide.into(), parts.into()).unwrap_or_else(|| Stages::whole(kernel))
            }
            KernelKind::ScatterMatrix { .. } => {
                Stages::of_outer(kernel).unwrap_or_else(|| Stages::whole(kernel))
            }
            KernelKind::Map
            | KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Scatter
            | KernelKind::Stream
            | KernelKind::StreamMatrix { .. }
            | KernelKind::Tiles
            | KernelKind::Few { .. } => Stages::whole(kernel),
        }
    }

    /// One launch.
    fn whole(kernel: &Kernel) -> Stages {
        let inputs = read(&kernel.body).enumerate().map(|(n, _)| Operand::Param(n)).collect();
        let stage = Stage { kernel: kernel.clone(), role: Role::Whole, inputs, output: Operand::Output };
        Stages { kept: Vec::new(), all: vec![stage] }
    }

    /// Those of a sum of outer products on tensor cores: what sorts its rows, and what multiplies.
    fn of_outer(kernel: &Kernel) -> Option<Stages> {
        let body = &kernel.body;
        let ScatterPlan { along, index, .. } = OuterPlan::of(body)?.scatter;
        let groups = body.axis(along).size.fixed()? as usize;
        let order = Operand::Kept(0);
        let mut whole = Stages::whole(kernel);
        let at = Operand::Param(body.params.iter().position(|p| *p == index)?);
        let sort = Stage { kernel: kernel.clone(), role: Role::Sort, inputs: vec![at], output: order };
        whole.all[0].inputs.push(order);
        whole.all.insert(0, sort);
        whole.kept.push(Kept::Order(sizes(body, body.ty(index)), groups));
        Some(whole)
    }

    /// Those of a product on tensor cores with the operands of one side as the wide ones and so many parts of what is summed, if it can be
    /// computed so.
    pub(crate) fn of_matrix(kernel: &Kernel, wide: usize, parts: u64) -> Option<Stages> {
        let body = &kernel.body;
        if parts == 1 && matrix::plan(body, wide).is_some_and(|plan| matrix::index(&plan).is_none()) {
            return Some(Stages::whole(kernel));
        }
        FewPlan::of(body, wide)?;
        let mut body = body.clone();
        let operands: Vec<_> =
            ContractPlan::of(&body).products(&body).iter().map(|p| p.operands[wide]).collect();
        let coded: BTreeSet<_> = operands.into_iter().filter_map(|value| decode(&mut body, value)).collect();
        let kernel = &Kernel { body, ..kernel.clone() };
        let body = &kernel.body;
        let params = read(body).enumerate().map(|(n, p)| (p, Operand::Param(n)));
        let mut cut = Cut { kernel, wide, given: params.collect(), kept: Vec::new(), stages: Vec::new() };
        for (n, elements) in coded.into_iter().enumerate() {
            cut.store(elements, &format!("weights{n}"))?;
        }
        let plan = FewPlan::of(&cut.function(body, body.results[0]).0, wide)?;
        for (n, narrow) in plan.narrows().into_iter().enumerate() {
            if !body.params.contains(&narrow) {
                cut.store(narrow, &format!("operand{n}"))?;
            }
        }
        let root = body.results[0];
        let (whole, _) = cut.function(body, root);
        if parts == 1 && matrix::plan(&whole, wide).is_some() {
            cut.tiles(body, root, "", Operand::Output)?;
        } else {
            cut.products(&plan, parts)?;
        }
        Some(Stages { kept: cut.kept, all: cut.stages })
    }
}

/// A kernel that is cut into launches.
struct Cut<'k> {
    kernel: &'k Kernel,
    wide: usize,
    /// What lies in memory, and where.
    given: Vec<(ValueId, Operand)>,
    kept: Vec<Kept>,
    stages: Vec<Stage>,
}

impl Cut<'_> {
    /// What computes a value of a body from what lies in memory, and where that is.
    fn function(&self, body: &Function, root: ValueId) -> (Function, Vec<Operand>) {
        let mut wanted = BTreeSet::from([root]);
        let mut made = Vec::new();
        for inst in body.body.iter().rev() {
            let here = |r: &ValueId| wanted.contains(r) && self.given.iter().all(|(v, _)| v != r);
            if inst.results.iter().any(here) {
                wanted.extend(&inst.args);
                made.push(inst.clone());
            }
        }
        made.reverse();
        let read: Vec<_> = self.given.iter().filter(|(v, _)| wanted.contains(v)).copied().collect();
        // What is written in place is a parameter that nobody gives.
        let cache = body.params.iter().copied().filter(|p| wanted.contains(p) && !CubeIr::reads(body, *p));
        let mut function = body.clone();
        function.body = made;
        function.params = cache.chain(read.iter().map(|(v, _)| *v)).collect();
        function.results = vec![root];
        (function, read.into_iter().map(|(_, at)| at).collect())
    }

    fn stage(
        &mut self,
        (mut body, inputs): (Function, Vec<Operand>),
        kind: KernelKind,
        suffix: &str,
        output: Operand,
    ) {
        let name = match suffix {
            "" => self.kernel.name.clone(),
            _ => format!("{}_{suffix}", self.kernel.name),
        };
        body.name.clone_from(&name);
        let kernel = Kernel { name, kind, body };
        self.stages.push(Stage { kernel, role: Role::Whole, inputs, output });
    }

    /// Memory for something in between.
    fn keep(&mut self, kept: Kept) -> Operand {
        self.kept.push(kept);
        Operand::Kept(self.kept.len() - 1)
    }

    /// Stores a value by a map.
    fn store(&mut self, value: ValueId, suffix: &str) -> Option<()> {
        let made = self.function(&self.kernel.body, value);
        let product = |op: &Op| matches!(op, Op::Contract | Op::Gather { .. });
        if made.0.body.iter().any(|i| product(&i.op)) {
            return None;
        }
        let kept = self.keep(Kept::value(&self.kernel.body, self.kernel.body.ty(value)));
        self.stage(made, KernelKind::Map, suffix, kept);
        self.given.push((value, kept));
        Some(())
    }

    /// Computes a value by tiles, with its rows in order if they are those of groups.
    fn tiles(&mut self, body: &Function, root: ValueId, suffix: &str, output: Operand) -> Option<()> {
        let (function, mut inputs) = self.function(body, root);
        let plan = matrix::plan(&function, self.wide)?;
        if let Some((along, index)) = matrix::index(&plan) {
            let groups = body.axis(along).size.fixed()? as usize;
            let at = self.given.iter().find(|(v, _)| *v == index)?.1;
            let known = |p: &&Stage| p.role == Role::Sort && p.inputs == [at];
            let order = match self.stages.iter().find(known) {
                Some(stage) => stage.output,
                None => {
                    let order = self.keep(Kept::Order(sizes(body, body.ty(index)), groups));
                    self.stage((function.clone(), vec![at]), self.kernel.kind, suffix, order);
                    self.stages.last_mut()?.role = Role::Sort;
                    order
                }
            };
            inputs.push(order);
        }
        self.stage((function, inputs), self.kernel.kind, suffix, output);
        Some(())
    }

    /// Stores each product, with all axes of an index and those that tell parts apart, and makes the result of them.
    fn products(&mut self, plan: &FewPlan, parts: u64) -> Option<()> {
        let mut body = self.kernel.body.clone();
        if parts > 1 && matrix::index(plan).is_some() {
            return None;
        }
        let part = (parts > 1).then(|| body.add_axis("part", Size::Fixed(parts), None));
        let mut made = Vec::new();
        for (n, product) in plan.products.iter().enumerate() {
            let ty = body.ty(product.result).clone();
            let lines = product.index.map_or(&[][..], |(_, index)| &body.ty(index).axes);
            let summed: Vec<_> =
                part.into_iter().chain(lines.iter().copied()).filter(|a| !ty.has(*a)).collect();
            let own = ty.axes.iter().copied().filter(|a| !lines.contains(a));
            let axes: Vec<_> = lines.iter().copied().chain(own).collect();
            let mut ty = Type::new(DType::F32, axes);
            let at = body.body.iter().position(|i| i.result() == product.result)?;
            let inst = body.body.remove(at);
            let name = format!("{}_lines", body.value(product.result).name);
            let lines = body.push(Op::Contract, &inst.args, &[(&name, ty.clone())])[0];
            let alone = body.clone();
            body.body.pop();
            // Each part is as much as the whole.
            ty.axes.splice(0..0, part);
            body.values[lines.0 as usize].ty = ty.clone();
            let kept = self.keep(Kept::value(&body, &ty));
            self.tiles(&alone, lines, &format!("product{n}"), kept)?;
            // What is left is added up.
            let mut sum = lines;
            for (n, &axis) in summed.iter().enumerate() {
                ty.axes.retain(|a| *a != axis);
                let op = Op::Reduce { by: Reduce::Sum, axis };
                let made = body.push(op, &[sum], &[(&format!("{name}_sum{n}"), ty.clone())])[0];
                let mut inst = body.body.pop()?;
                if n + 1 == summed.len() {
                    inst.results = vec![product.result];
                }
                body.body.insert(at + n, inst);
                sum = made;
            }
            if summed.is_empty() {
                body.values[product.result.0 as usize].ty = ty;
                made.push((product.result, kept));
            } else {
                made.push((lines, kept));
            }
        }
        self.given.extend(made);
        let result = self.function(&body, body.results[0]);
        self.stage(result, KernelKind::Map, "rest", Operand::Output);
        Some(())
    }
}
