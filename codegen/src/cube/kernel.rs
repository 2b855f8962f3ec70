//! A kernel of a program as CubeCL sees it.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use cubecl_core::KernelSettings;
use cubecl_core::ir::{AddressType, StorageType};
use cubecl_core::prelude::{CubeDim, CubeKernel, KernelDefinition, KernelId, KernelMetadata};
use latentc_ir::ops::Attr;
use latentc_ir::{AxisId, DType, Function, Op, Size, ValueId, Want, infer};

use super::edits::Edit;
use super::emit::{Buf, Elem, Emit, Val};
use super::expr::Exprs;
use super::map::Map;
use super::matrix::Tile;
use super::scatter_matrix::{self, OuterPlan, OuterTile};
use super::shape::LaunchShape;
use super::split::{Role, SHARED};
use super::stream_matrix::{self, MatrixPlan, Tiling};
use super::target::Target;
use super::{bulk, contract, few, matrix, overlap, refuse, scatter, sort, split, stream};
use crate::contract::{ContractPlan, Rotation};
use crate::device::DeviceError;
use crate::digest::digest;
use crate::few::FewPlan;
use crate::map::{append, made};
use crate::program::{Kernel, KernelKind};
use crate::scatter::ScatterPlan;
use crate::stream::{Monoid, StreamPlan};

/// Operations that may hang below one another: emission recurses, in CubeCL's threads too.
const DEEPEST: usize = 400;

/// The longest table of constants that is worth a comparison for each entry.
const TABLE: usize = 64;

/// A kernel that was checked for a target, or several side by side; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct CubeIr {
    /// Each has the cubes behind those of the one before it.
    parts: Arc<[Part]>,
    settings: Arc<KernelSettings>,
    /// What is compiled in place of its own text.
    edit: Option<Arc<Edit>>,
    /// What CubeCL knows it by.
    id: KernelId,
}

/// What some cubes of a grid do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Part {
    spec: Arc<Spec>,
    /// Which of the kernels with that body; most are whole.
    role: Role,
}

/// All that decides the code. CubeCL compiles once for each, so nothing that matters may be missing.
#[derive(Debug)]
struct Spec {
    kernel: Kernel,
    target: Target,
    /// Of a streamed softmax.
    plan: Option<StreamPlan>,
    digest: u64,
}

impl PartialEq for Spec {
    fn eq(&self, other: &Spec) -> bool {
        std::ptr::eq(self, other) || (self.target == other.target && self.kernel == other.kernel)
    }
}

impl Eq for Spec {}

impl Hash for Spec {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl CubeIr {
    fn new_of(parts: Arc<[Part]>, settings: Arc<KernelSettings>, edit: Option<Arc<Edit>>) -> CubeIr {
        let id = KernelId::new::<Self>()
            .info((Arc::clone(&parts), edit.clone()))
            .address_type(settings.address_type)
            .cube_dim(settings.cube_dim);
        CubeIr { parts, settings, edit, id }
    }

    /// Checks a kernel for a target.
    ///
    /// # Errors
    /// If the body is not of its kind, is too deep, or has a dtype that the target cannot hold.
    pub(crate) fn new(kernel: &Kernel, target: Target) -> Result<CubeIr, DeviceError> {
        check(kernel, target).map_err(|why| refuse(kernel, why))?;
        let mut hasher = DefaultHasher::new();
        (&kernel.name, kernel.kind, kernel.body.to_string()).hash(&mut hasher);
        let settings = KernelSettings::default()
            .cube_dim(CubeDim::new_1d(LaunchShape::of(kernel).units))
            .address_type(AddressType::U32)
            .kernel_name(kernel.name.as_str());
        let plan = kernel.kind.streams().then(|| StreamPlan::of(&kernel.body));
        let plan = plan.transpose().map_err(|why| refuse(kernel, why))?;
        let spec = Spec { kernel: kernel.clone(), target, plan, digest: hasher.finish() };
        let part = Part { spec: Arc::new(spec), role: Role::Whole };
        Ok(CubeIr::new_of(Arc::new([part]), Arc::new(settings), None))
    }

    /// Another of the kernels with that body: what sorts the rows of a grouped product, or one of the two that a streamed softmax can be
    /// split into. Of these, the buffers are the parameters that it reads, in order, then
    /// what the first leaves for the second, then the second's output; its last size is the number of positions of a part.
    pub(crate) fn of_role(&self, role: Role) -> CubeIr {
        let part = Part { role, ..self.parts[0].clone() };
        let name = format!("{}{}", part.spec.kernel.name, role.suffix());
        let units = LaunchShape::of_role(&part.spec.kernel, role, part.spec.target).units;
        let settings =
            KernelSettings::clone(&self.settings).kernel_name(name.as_str()).cube_dim(CubeDim::new_1d(units));
        CubeIr::new_of(Arc::new([part]), Arc::new(settings), None)
    }

    /// Kernels side by side in one grid, all with as many units a cube. Its buffers and sizes are those of each, one after another;
    /// behind the sizes comes, for each but the first, the number of its first cube, and in the end that of all cubes.
    ///
    /// # Panics
    /// If there are none.
    pub(crate) fn together<'k>(kernels: impl IntoIterator<Item = &'k CubeIr>) -> CubeIr {
        let mut kernels = kernels.into_iter().peekable();
        let settings = KernelSettings::clone(&kernels.peek().expect("there are some").settings);
        let parts: Vec<_> = kernels.flat_map(|k| k.parts.iter().cloned()).collect();
        let name = together_name(parts.iter().map(|p| p.spec.kernel.name.as_str()));
        let settings = settings.kernel_name(name.as_str());
        CubeIr::new_of(parts.into(), Arc::new(settings), None)
    }

    /// The same, compiled from another text.
    pub(crate) fn with_edit(self, edit: Arc<Edit>) -> CubeIr {
        CubeIr::new_of(self.parts, self.settings, Some(edit))
    }

    /// What is compiled in place of its own text.
    pub(crate) fn edit(&self) -> Option<&Arc<Edit>> {
        self.edit.as_ref()
    }

    /// The kernels side by side, and which of those with their bodies they are. All are for one target.
    pub(crate) fn kernels(&self) -> Vec<(&Kernel, Role)> {
        self.parts.iter().map(|part| (&part.spec.kernel, part.role)).collect()
    }

    /// The first of them.
    pub(crate) fn first(&self) -> &Kernel {
        &self.parts[0].spec.kernel
    }

    /// The language that it is for.
    pub(crate) fn target(&self) -> Target {
        self.parts[0].spec.target
    }

    /// What it is known by in any program, whatever it is called: equal for kernels that compute the same in the same way.
    pub(crate) fn identity(&self) -> u64 {
        let known = |part: &Part| known_by(&part.spec.kernel, part.spec.target, part.role);
        digest(self.parts.iter().flat_map(|p| known(p).into_bytes()))
    }

    /// Operands that the device copies by itself. Their maps come before a launch's buffers.
    pub(crate) fn maps(&self) -> Vec<bulk::Map> {
        match &self.parts[..] {
            [Part { spec, role: Role::Whole | Role::Part }] => bulk::of_kernel(&spec.kernel),
            _ => Vec::new(),
        }
    }

    /// The plan of a streamed softmax.
    pub(crate) fn plan(&self) -> Option<&StreamPlan> {
        self.parts[0].spec.plan.as_ref()
    }

    /// Whether a parameter of the body is a buffer of the kernel: all but the cache that an `append` writes.
    pub(crate) fn reads(body: &Function, param: ValueId) -> bool {
        appended(body) != Some(param)
    }
}

/// What decides what a kernel computes, and how.
fn known_by(kernel: &Kernel, target: Target, role: Role) -> String {
    format!("{target:?} {:?} {role:?}\n{}", kernel.kind, kernel.nameless())
}

/// The [identity](CubeIr::identity) that a kernel has by itself, of which no device need be able to run it as it is.
pub(crate) fn identity(kernel: &Kernel, target: Target) -> u64 {
    digest(known_by(kernel, target, Role::Whole).into_bytes())
}

/// The name of kernels side by side.
pub(crate) fn together_name<'a>(mut names: impl Iterator<Item = &'a str>) -> String {
    let first = names.next().unwrap_or_default();
    match names.count() {
        0 => first.to_owned(),
        more => format!("{first}_and_{more}"),
    }
}

impl KernelMetadata for CubeIr {
    fn id(&self) -> KernelId {
        self.id.clone()
    }

    fn address_type(&self) -> StorageType {
        self.settings.address_type.unsigned_type()
    }
}

impl CubeKernel for CubeIr {
    fn define(&self) -> KernelDefinition {
        let mut e = Emit::new();
        if self.target() == Target::Cuda {
            e.let_next_begin();
        }
        let declared: Vec<_> = self.parts.iter().map(|part| part.declare(&mut e)).collect();
        let shapes = self.parts.iter().map(|p| LaunchShape::of_role(&p.spec.kernel, p.role, p.spec.target));
        if let Some(shape) = shapes.reduce(LaunchShape::beside) {
            e.in_common(&shape.common);
        }
        match (&self.parts[..], declared) {
            ([part], declared) => declared.into_iter().for_each(|d| part.emit(&mut e, d)),
            (parts, declared) => {
                let ends: Vec<_> = parts.iter().map(|_| e.size()).collect();
                let mut first = e.u32(0);
                let units = self.settings.cube_dim.x;
                for ((part, declared), end) in parts.iter().zip(declared).zip(ends) {
                    e.cubes(first, end, units, |e| part.emit(e, declared));
                    first = end;
                }
            }
        }
        e.finish(KernelSettings::clone(&self.settings))
    }
}

/// The arguments of a kernel.
struct Declared {
    /// Of the parameters that it reads.
    inputs: Vec<Option<Buf>>,
    /// What the parts of a streamed softmax have left.
    kept: Option<Buf>,
    /// The rows of a grouped product by groups.
    order: Option<Buf>,
    output: Buf,
    /// In the order of [`Kernel::size_symbols`].
    sizes: Vec<Val>,
    /// Positions of a part of a streamed softmax.
    chunk: Option<Val>,
}

impl Part {
    fn stored(&self, v: ValueId) -> Elem {
        let Spec { kernel, target, .. } = &*self.spec;
        target.stored(kernel.body.ty(v).dtype).expect("checked for this target")
    }

    fn declare(&self, e: &mut Emit) -> Declared {
        let Spec { kernel, plan, target, .. } = &*self.spec;
        let body = &kernel.body;
        let grouped = match Form::of(kernel, *target) {
            Form::Matrix(plan, _) => matrix::index(&plan).map(|(_, index)| index),
            Form::ScatterMatrix(plan, _) => Some(plan.scatter.index),
            Form::Map(_)
            | Form::Tiles(_)
            | Form::Scatter(_)
            | Form::Stream(_)
            | Form::StreamMatrix(..)
            | Form::Few(..) => None,
        };
        let read = match (plan, grouped) {
            (Some(plan), _) => self.role.reads(body, plan),
            (None, Some(index)) if self.role == Role::Sort => vec![index],
            (None, _) => body.params.clone(),
        };
        let reads = |p: ValueId| CubeIr::reads(body, p) && read.contains(&p);
        let inputs = body.params.iter().map(|&p| reads(p).then(|| e.input(self.stored(p)))).collect();
        let kept = (self.role == Role::Merge).then(|| e.input(Elem::F32));
        let order = grouped.filter(|_| self.role == Role::Whole).map(|_| e.input(Elem::U32));
        let output = match self.role {
            Role::Whole | Role::Merge => e.output(self.stored(body.results[0])),
            Role::Part => e.output(Elem::F32),
            Role::Sort => e.output(Elem::U32),
        };
        let sizes = kernel.size_symbols().into_iter().map(|_| e.size()).collect();
        let chunk = matches!(self.role, Role::Part | Role::Merge).then(|| e.size());
        Declared { inputs, kept, order, output, sizes, chunk }
    }

    fn emit(&self, e: &mut Emit, declared: Declared) {
        let Spec { kernel, target, .. } = &*self.spec;
        let Declared { inputs, kept, order, output, sizes, chunk } = declared;
        let body = &kernel.body;
        let symbols = kernel.size_symbols();
        let extents = body.axes.iter().map(|axis| match &axis.size {
            Size::Fixed(n) => e.u32(*n as u32),
            Size::Sym(s) => sizes[symbols.iter().position(|x| x == s).expect("collected from these axes")],
        });
        let extents = extents.collect();
        let exprs = Exprs::new(body, *target, extents, &inputs);
        let buffer = |v: ValueId| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
        let input = |v: ValueId| buffer(v).expect("operands are parameters, by the check");
        let form = Form::of(kernel, *target);
        if *target == Target::Cuda && overlap::early(body, &form).is_empty() {
            e.await_grids();
        }
        if *target == Target::Cuda
            && let Some(count) = cubes_at_once(kernel, &form, self.role)
        {
            e.cubes_at_once(count);
        }
        match form {
            Form::Map(map) => map.emit(e, exprs, output),
            Form::Stream(plan) => match (kept, chunk) {
                (Some(kept), Some(chunk)) => split::emit(e, exprs, &plan, kept, chunk, output),
                (_, chunk) => stream::emit(e, exprs, &plan, chunk, output),
            },
            Form::StreamMatrix(plan, tiling) => match (kept, chunk) {
                (Some(kept), Some(chunk)) => split::emit(e, exprs, &plan.stream, kept, chunk, output),
                (_, chunk) => {
                    let elem = target.stored(plan.dtype).expect("checked for this target");
                    stream_matrix::emit(e, exprs, (&plan, tiling), chunk, (&buffer, elem), output);
                }
            },
            Form::Scatter(plan) => {
                let factors: Vec<_> = plan.factors.iter().map(|&x| input(x)).collect();
                scatter::emit(e, &exprs, &plan, &factors, input(plan.index), output);
            }
            Form::ScatterMatrix(plan, tile) => match order {
                Some(order) => {
                    let buffer = |v: ValueId| (input(v), self.stored(v));
                    scatter_matrix::emit(e, &exprs, (&plan, tile), buffer, order, output);
                }
                None => {
                    let sizes = (exprs.total(e, &plan.scatter.rows), exprs.extent(plan.scatter.along));
                    sort::emit(e, sizes, input(plan.scatter.index), output);
                }
            },
            Form::Few(plan, rows) => few::emit(e, exprs, &plan, (rows, *target), buffer, output),
            Form::Matrix(plan, tile) => match (self.role, matrix::index(&plan)) {
                (Role::Sort, Some((along, index))) => {
                    let sizes = (exprs.total(e, &plan.rows), exprs.extent(along));
                    sort::emit(e, sizes, input(index), output);
                }
                _ => {
                    let buffer = |v: ValueId| (input(v), self.stored(v));
                    matrix::emit(e, exprs, (&plan, tile), buffer, order, output);
                }
            },
            Form::Tiles(plan) => contract::emit(e, exprs, &plan, buffer, output),
        }
    }
}

/// How a kernel is written.
pub(crate) enum Form {
    /// By elements or rows. So are scalar products: a tile of them would have one element.
    Map(Map),
    /// By tiles.
    Tiles(ContractPlan),
    /// By rows that are added up where an index says.
    Scatter(ScatterPlan),
    /// The same by tiles that tensor cores multiply, of so many rows and columns.
    ScatterMatrix(OuterPlan, OuterTile),
    /// By tiles of rows and columns, along a streamed axis.
    Stream(StreamPlan),
    /// The same by tiles that tensor cores multiply.
    StreamMatrix(MatrixPlan, Tiling),
    /// By so many rows at once, and some columns.
    Few(FewPlan, u32),
    /// By tiles that tensor cores multiply.
    Matrix(FewPlan, Tile),
}

impl Form {
    pub(crate) fn of(kernel: &Kernel, target: Target) -> Form {
        // Also what the check refuses, which is never emitted.
        let map = || Form::Map(Map::of(&kernel.body, target));
        match kernel.kind {
            // Each unit finds its own matrix: right, and for a few rows not slow.
            KernelKind::Map | KernelKind::Grouped => map(),
            KernelKind::Stream => StreamPlan::of(&kernel.body).map_or_else(|_| map(), Form::Stream),
            KernelKind::StreamMatrix { .. } => {
                tiled(kernel).map_or_else(map, |(plan, tiling)| Form::StreamMatrix(plan, tiling))
            }
            KernelKind::Scatter => ScatterPlan::of(&kernel.body).map_or_else(map, Form::Scatter),
            KernelKind::ScatterMatrix { side, by } => {
                let tile = OuterTile { side, by };
                OuterPlan::of(&kernel.body).map_or_else(map, |plan| Form::ScatterMatrix(plan, tile))
            }
            KernelKind::Few { wide, rows } => {
                FewPlan::of(&kernel.body, wide.into()).map_or_else(map, |plan| Form::Few(plan, rows.into()))
            }
            KernelKind::Matrix { wide, .. } => matrix::plan(&kernel.body, wide.into())
                .zip(Tile::of(kernel.kind))
                .map_or_else(map, |(plan, tile)| Form::Matrix(plan, tile)),
            KernelKind::Contract | KernelKind::Tiles => {
                let plan = ContractPlan::of(&kernel.body);
                if plan.m.is_empty() && plan.n.is_empty() { map() } else { Form::Tiles(plan) }
            }
        }
    }
}

/// How many cubes on a processor will have to do, if it is worth to say so.
fn cubes_at_once(kernel: &Kernel, form: &Form, role: Role) -> Option<u32> {
    match form {
        // These make what they fold again, by divisions, while they hold several sums; parts keep what is known of rows as well.
        Form::Stream(plan) if plan.by != Monoid::Softmax || role == Role::Part => Some(2),
        // One that has all registers is better than two that spill.
        Form::Stream(_) => Some(1),
        Form::Few(_, rows) if *rows > 1 => Some(2),
        // What is read waits in shared memory, which has room for no more cubes.
        Form::Few(plan, rows) => {
            let tiling = few::Tiling::of(&kernel.body, plan, *rows, Target::Cuda);
            if tiling.ring == 0 {
                return None;
            }
            let room = SHARED / LaunchShape::of(kernel).shared_bytes.max(1);
            // Four leave a unit 64 registers. Two columns of two products do not always have enough of them.
            let most = if tiling.packs() > 2 && plan.products.len() > 1 { 3 } else { 4 };
            u32::try_from(room).ok().filter(|room| (1..=4).contains(room)).map(|room| room.min(most))
        }
        // Where it may choose, ptxas spills around the slow path of an angle for sm_100, to have a fifth cube.
        Form::Tiles(_) if Rotation::of(&kernel.body).is_some() => Some(4),
        Form::Map(_) | Form::Tiles(_) | Form::Scatter(_) => None,
        // Those of these that need it say so by themselves.
        Form::ScatterMatrix(..) | Form::StreamMatrix(..) | Form::Matrix(..) => None,
    }
}

/// A stream on tensor cores, and its cube.
fn tiled(kernel: &Kernel) -> Option<(MatrixPlan, Tiling)> {
    let KernelKind::StreamMatrix { tall, by } = kernel.kind else { return None };
    let plan = MatrixPlan::of(&kernel.body)?;
    let tiling = plan.tiling(tall, by)?;
    Some((plan, tiling))
}

/// The cache that the last instruction writes.
fn appended(body: &Function) -> Option<ValueId> {
    append(body).map(|i| i.args[0])
}

/// Whether code can be made of a kernel. What passes does not panic later.
fn check(kernel: &Kernel, target: Target) -> Result<(), String> {
    let body = &kernel.body;
    let name = kernel.name.as_bytes();
    if name.is_empty()
        || name[0].is_ascii_digit()
        || !name.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_')
    {
        return Err(format!("`{}` is no name for a function in {target}", kernel.name));
    }
    for axis in &body.axes {
        if axis.size.fixed().is_some_and(|n| n > u32::MAX.into()) {
            return Err(format!("axis `{}` has size {}, indices have 32 bits", axis.name, axis.size));
        }
    }
    check_values(body)?;
    for v in &body.values {
        if target.stored(v.ty.dtype).is_none() {
            return Err(format!("`{}` is {}, which {target} kernels cannot hold", v.name, v.ty.dtype));
        }
    }
    match kernel.kind {
        KernelKind::Map | KernelKind::Grouped => check_map(body),
        KernelKind::Contract | KernelKind::Tiles => check_contract(body),
        KernelKind::Scatter => check_scatter(body),
        KernelKind::ScatterMatrix { side, by } => {
            check_scatter(body)?;
            let known = OuterTile::ALL.contains(&OuterTile { side, by }) && target == Target::Cuda;
            let has = known && OuterPlan::of(body).is_some();
            if has { Ok(()) } else { Err(format!("tensor cores do not multiply this in {target}")) }
        }
        KernelKind::Stream => check_stream(body),
        KernelKind::StreamMatrix { .. } => {
            check_stream(body)?;
            let has = target == Target::Cuda && tiled(kernel).is_some();
            if has { Ok(()) } else { Err(format!("tensor cores do not multiply this in {target}")) }
        }
        KernelKind::Matrix { wide, .. } => {
            check_map(body)?;
            let tile = Tile::of(kernel.kind).filter(|_| wide < 2 && target == Target::Cuda);
            let plan = tile.and_then(|tile| Some((tile, matrix::plan(body, wide.into())?)));
            let has = plan.is_some_and(|(tile, plan)| tile.fits(body, &plan));
            if has { Ok(()) } else { Err(format!("tensor cores do not multiply this in {target}")) }
        }
        KernelKind::Few { wide, rows } => {
            check_map(body)?;
            let rows = rows.is_power_of_two() && rows <= 8;
            match FewPlan::of(body, wide.into()) {
                Some(_) if rows && wide < 2 => Ok(()),
                _ => Err("it is no product with few rows".to_owned()),
            }
        }
    }
}

/// Every value is defined once, before its uses, and has the type that inference allows.
fn check_values(body: &Function) -> Result<(), String> {
    if !body.weights.is_empty() || !body.caches.is_empty() {
        return Err("the body has weights or caches; a kernel has parameters only".to_owned());
    }
    let mut depths: Vec<Option<usize>> = vec![None; body.values.len()];
    let out_of_range = |v: ValueId| v.0 as usize >= body.values.len();
    let bad_axis = |v: ValueId| body.ty(v).axes.iter().any(|a| a.0 as usize >= body.axes.len());
    for &p in &body.params {
        if out_of_range(p) || bad_axis(p) || depths[p.0 as usize].replace(0).is_some() {
            return Err(format!("parameter {} is no value or defined twice", p.0));
        }
    }
    for inst in &body.body {
        let &[result] = &inst.results[..] else {
            return Err(format!("`{}` has {} results", inst.op.mnemonic(), inst.results.len()));
        };
        let mut depth = 1;
        for &a in &inst.args {
            let known = depths.get(a.0 as usize).copied().flatten();
            depth = depth.max(1 + known.ok_or_else(|| format!("value {} is used before it is made", a.0))?);
        }
        if depth > DEEPEST {
            return Err(format!("more than {DEEPEST} operations hang below one another"));
        }
        if out_of_range(result) || bad_axis(result) || depths[result.0 as usize].replace(depth).is_some() {
            return Err(format!("value {} does not exist or is made twice", result.0));
        }
        if named(&inst.op).iter().any(|a| a.0 as usize >= body.axes.len()) {
            return Err(format!("`{}` names an axis that does not exist", inst.op.mnemonic()));
        }
        let args: Vec<_> = inst.args.iter().map(|&a| body.ty(a)).collect();
        infer(&inst.op, &args, Want::exactly(body.ty(result)), &body.axes)?;
    }
    match body.results[..] {
        [r] if depths.get(r.0 as usize).is_some_and(Option::is_some) => Ok(()),
        _ => Err("a kernel has one result, made in its body".to_owned()),
    }
}

/// The axes among an op's attributes.
fn named(op: &Op) -> Vec<AxisId> {
    let axes = op.attrs().into_iter().map(|attr| match attr {
        Attr::Axis(axis) => vec![axis],
        Attr::Axes(axes) => axes,
        Attr::Int(_) | Attr::Real(_) | Attr::Word(_) | Attr::Text(_) => vec![],
    });
    axes.flatten().collect()
}

fn check_map(body: &Function) -> Result<(), String> {
    check_tables(body)?;
    let cache = appended(body);
    for (n, inst) in body.body.iter().enumerate() {
        let last = n + 1 == body.body.len();
        let name = inst.op.mnemonic();
        match &inst.op {
            Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => {
                return Err(format!("`{name}` is no part of a map"));
            }
            Op::Append { .. }
                if !last || inst.result() != body.results[0] || !body.params.contains(&inst.args[0]) =>
            {
                return Err("`append` must come last and write a parameter".to_owned());
            }
            Op::Append { .. }
            | Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Reduce { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Gather { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::Rope { .. } => {}
        }
        let operands = if last && cache.is_some() { &inst.args[1..] } else { &inst.args[..] };
        if operands.iter().any(|a| Some(*a) == cache) {
            return Err(format!("`{name}` reads the cache that the kernel writes"));
        }
    }
    Ok(())
}

fn check_stream(body: &Function) -> Result<(), String> {
    StreamPlan::of(body)?;
    check_tables(body)
}

/// Tables of constants are written out.
fn check_tables(body: &Function) -> Result<(), String> {
    let mut tables = body.body.iter().filter_map(|inst| {
        let Op::Const(table) = &inst.op else { return None };
        Some(table.len())
    });
    match tables.find(|n| !(1..=TABLE).contains(n)) {
        Some(n) => Err(format!("a table of {n} constants; 1 to {TABLE} fit into a kernel")),
        None => Ok(()),
    }
}

fn check_contract(body: &Function) -> Result<(), String> {
    check_map(body)?;
    let mut shape = None;
    for inst in body.body.iter().filter(|i| i.op == Op::Contract) {
        if inst.args.len() != 2 {
            return Err(format!("a `contract` of {} operands; a product has two", inst.args.len()));
        }
        let summed = body.summed(&inst.args, body.ty(inst.result()));
        if let Some(&s) = summed.iter().find(|&&s| !inst.args.iter().all(|&a| body.ty(a).has(s))) {
            return Err(format!("axis `{}` is summed but not in both operands", body.axis(s).name));
        }
        let set = |v: ValueId| body.ty(v).axes.iter().copied().collect::<BTreeSet<_>>();
        let here = (set(inst.result()), inst.args.iter().map(|&a| set(a)).collect::<BTreeSet<_>>());
        if *shape.get_or_insert_with(|| here.clone()) != here {
            return Err("products of different shapes".to_owned());
        }
        if here.0 != set(made(body)) {
            return Err("what is made of a product has its axes".to_owned());
        }
    }
    shape.map(|_| ()).ok_or_else(|| "a product has a `contract`".to_owned())
}

fn check_scatter(body: &Function) -> Result<(), String> {
    if ScatterPlan::of(body).is_none() {
        return Err("a scatter is one `scatter_add` of parameters, or of the product of two".to_owned());
    }
    let result = body.value(body.results[0]);
    // Sums are kept where they are written, and would be rounded each time.
    if result.ty.dtype != DType::F32 {
        return Err(format!("`{}` is {}, but sums are f32; `cast` them after", result.name, result.ty.dtype));
    }
    Ok(())
}
