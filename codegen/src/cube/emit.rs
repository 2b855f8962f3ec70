//! A thin layer over CubeCL's instruction stream, typed at run time.
//!
//! [`Emit`] turns method calls (`add`, `load`, `for_step`, `if_`, …) into CubeCL's representation, so a kernel can be built
//! from data instead of from a `#[cube]` function. Every value is a [`Val`], and every operation makes a fresh
//! immutable one; what changes lives in a [`Var`] (a register), [`Shared`] (memory of a cube) or [`Buf`] (global memory).
//! Integer arithmetic of constants is done here, so index expressions of fixed sizes come out short.

use cubecl_core::KernelSettings;
use cubecl_core::ir::{
    AddressType, Arithmetic, BarrierOps, BinaryOperator, Bitwise, Branch, Builtin, Comparison, ConstantValue,
    CoopMma, ElemType, FastMath, FloatKind, FmaOperator, If, IndexAssignOperator, IndexOperator, Instruction,
    InstructionModes, IntKind, Matrix, MatrixIdent, MatrixLayout, NonSemantic, Operation, Operator, Plane,
    RangeLoop, Scope, Select, StorageType, Synchronization, Type, UIntKind, UnaryOperator, Variable,
    VariableKind, VectorInitOperator,
};
use cubecl_core::prelude::{KernelBuilder, KernelDefinition};

use super::target::Target;

/// What stands in a text before an instruction on copies that CubeCL has no name for: see `source`.
pub(super) const COPIES: &str = "latentc: cp.async.";

/// What stands in a text for an instruction that CubeCL has no name for, most of them on products of groups of planes: see `warpgroup`.
pub(super) const GROUPS: &str = "latentc: wgmma ";

/// What stands in a text for an instruction on the grids before and behind it: see `overlap`.
pub(super) const GRIDS: &str = "latentc: grid ";

/// What stands in a text before the number of cubes on a processor that its kernel is to leave registers for.
pub(super) const CUBES: &str = "latentc: cubes ";

/// Units of a plane on CUDA.
pub(super) const PLANE: u32 = 32;

/// The type of an element in memory or in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Elem {
    F32,
    F16,
    Bf16,
    I32,
    U32,
    /// In memory only.
    U8,
    /// In registers only.
    Bool,
}

impl Elem {
    fn ir(self) -> ElemType {
        match self {
            Elem::F32 => ElemType::Float(FloatKind::F32),
            Elem::F16 => ElemType::Float(FloatKind::F16),
            Elem::Bf16 => ElemType::Float(FloatKind::BF16),
            Elem::I32 => ElemType::Int(IntKind::I32),
            Elem::U32 => ElemType::UInt(UIntKind::U32),
            Elem::U8 => ElemType::UInt(UIntKind::U8),
            Elem::Bool => ElemType::Bool,
        }
    }

    /// CubeCL's name for it.
    pub(crate) fn storage(self) -> StorageType {
        StorageType::Scalar(self.ir())
    }

    fn ty(self) -> Type {
        Type::new(self.storage())
    }

    /// Bytes of one element in memory.
    pub(crate) fn bytes(self) -> usize {
        self.ir().size()
    }
}

/// An immutable value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Val(Variable);

impl Val {
    /// The number, if this is an unsigned constant.
    pub(crate) fn known(self) -> Option<u64> {
        match self.0.kind {
            VariableKind::Constant(ConstantValue::UInt(n)) => Some(n),
            _ => None,
        }
    }
}

/// A mutable register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Var(Variable);

/// A kernel argument in global memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buf(Variable);

/// Memory shared by the units of one cube.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared(Variable);

/// What can be read and written by index.
pub(crate) trait Memory: Copy {
    fn variable(self) -> Variable;
}

impl Memory for Buf {
    fn variable(self) -> Variable {
        self.0
    }
}

/// Registers with numbers, which are known when the kernel is built.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Array(Variable);

impl Memory for Array {
    fn variable(self) -> Variable {
        self.0
    }
}

impl Memory for Shared {
    fn variable(self) -> Variable {
        self.0
    }
}

/// A function of one value, of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Un {
    Neg,
    Abs,
    Exp,
    Ln,
    Sqrt,
    Rsqrt,
    Tanh,
    Sin,
    Cos,
}

/// A function of two values of one type, of that type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bin {
    Add,
    Sub,
    Mul,
    /// Of integers: truncating.
    Div,
    /// C's `%`.
    Rem,
    Max,
    Min,
}

/// An operation on the bits of unsigned numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    And,
    Or,
    Xor,
    /// Shifted up.
    Left,
    /// Shifted down.
    Right,
}

/// A comparison of two values of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cmp {
    Lt,
    Le,
    Eq,
    Ne,
    Gt,
}

/// Several elements that lie behind one another in memory.
#[derive(Clone, Debug)]
pub(crate) enum Pack {
    /// In one register.
    Vector(Val),
    /// In as many.
    Elements(Vec<Val>),
}

/// How many of so many elements side by side one access of 16 bytes has.
fn beside(memory: impl Memory, count: u32) -> u32 {
    count.min((16 / memory.variable().ty.size().max(1)) as u32)
}

/// Builds one kernel.
pub(crate) struct Emit {
    builder: KernelBuilder,
    address: StorageType,
    /// Where a kernel is one of several in a grid: the number of its first cube, and the units of a cube.
    behind: Option<(Val, u32)>,
    /// Shared arrays that all kernels of the grid have, and which of them the kernel at hand has taken.
    common: Vec<(Elem, Shared, bool)>,
}

impl Emit {
    /// An empty kernel with 32-bit addresses. Buffers and scalars are numbered as they are declared.
    pub(crate) fn new() -> Emit {
        let mut builder = KernelBuilder::default();
        // The code that CubeCL adds around ours cannot name `usize` otherwise.
        AddressType::U32.register(&mut builder.scope);
        Emit { builder, address: AddressType::U32.unsigned_type(), behind: None, common: Vec::new() }
    }

    /// The finished kernel.
    pub(crate) fn finish(self, settings: KernelSettings) -> KernelDefinition {
        self.builder.build(settings)
    }

    // --- arguments ---------------------------------------------------------------------------------

    /// Declares the next buffer, to be read.
    pub(crate) fn input(&mut self, elem: Elem) -> Buf {
        Buf(*self.builder.input_array(elem.ty()))
    }

    /// Declares the next buffer, to be read and written.
    pub(crate) fn output(&mut self, elem: Elem) -> Buf {
        Buf(*self.builder.output_array(elem.ty()))
    }

    /// Declares the next run-time size.
    pub(crate) fn size(&mut self) -> Val {
        Val(*self.builder.scalar(Elem::U32.storage()))
    }

    // --- values ------------------------------------------------------------------------------------

    /// An unsigned constant.
    pub(crate) fn u32(&self, value: u32) -> Val {
        Val(Variable::constant(ConstantValue::UInt(value.into()), Elem::U32.ty()))
    }

    /// A signed constant.
    pub(crate) fn i32(&self, value: i32) -> Val {
        Val(Variable::constant(ConstantValue::Int(value.into()), Elem::I32.ty()))
    }

    /// A float. Infinities and NaN are made from their bits in a register: WGSL has no literal for them and
    /// refuses constant expressions that yield one.
    pub(crate) fn f32(&mut self, value: f32) -> Val {
        if value.is_finite() {
            return Val(Variable::constant(ConstantValue::Float(value.into()), Elem::F32.ty()));
        }
        let bits = self.u32(value.to_bits());
        let bits = self.var(bits);
        let bits = self.get(bits);
        self.as_float(bits)
    }

    /// The float with these bits.
    pub(crate) fn as_float(&mut self, bits: Val) -> Val {
        self.push(Operator::Reinterpret(UnaryOperator { input: bits.0 }), Elem::F32)
    }

    /// A truth value.
    pub(crate) fn bool(&self, value: bool) -> Val {
        Val(Variable::constant(ConstantValue::Bool(value), Elem::Bool.ty()))
    }

    /// The unit's number in its cube.
    pub(crate) fn unit(&mut self) -> Val {
        Val(Variable::builtin(Builtin::UnitPos, Elem::U32.storage()))
    }

    /// The cube's number among the kernel's, row after row.
    pub(crate) fn cube(&mut self) -> Val {
        let cube = self.flat(Builtin::CubePos);
        match self.behind {
            Some((first, _)) => self.sub(cube, first),
            None => cube,
        }
    }

    /// How many cubes the grid has.
    pub(crate) fn cubes_in_grid(&mut self) -> Val {
        self.flat(Builtin::CubeCount)
    }

    /// The unit's number among the kernel's, row after row.
    pub(crate) fn unit_in_grid(&mut self) -> Val {
        match self.behind {
            Some((_, units)) => {
                let (cube, units, unit) = (self.cube(), self.u32(units), self.unit());
                let before = self.mul(cube, units);
                self.add(before, unit)
            }
            None => self.flat(Builtin::AbsolutePos),
        }
    }

    /// A kernel that has the cubes from `first` up to `end`, which number themselves from 0. Each has so many units.
    pub(crate) fn cubes(&mut self, first: Val, end: Val, units: u32, body: impl FnOnce(&mut Emit)) {
        let cube = self.flat(Builtin::CubePos);
        let mut inside = self.lt(cube, end);
        if first.known() != Some(0) {
            let before = self.lt(cube, first);
            let behind = self.not(before);
            inside = self.and(inside, behind);
        }
        self.if_(inside, |e| {
            e.behind = Some((first, units));
            e.common.iter_mut().for_each(|(.., taken)| *taken = false);
            body(e);
            e.behind = None;
        });
    }

    /// Whether the kernel is one of several in a grid.
    pub(crate) fn shares_grid(&self) -> bool {
        self.behind.is_some()
    }

    /// Flat positions have the type of addresses, which need not be u32 for the printer.
    fn flat(&mut self, builtin: Builtin) -> Val {
        let wide = Variable::builtin(builtin, self.address);
        self.push(Operator::Cast(UnaryOperator { input: wide }), Elem::U32)
    }

    fn push(&mut self, op: impl Into<Operation>, elem: Elem) -> Val {
        self.push_as(op, elem.ty())
    }

    fn push_as(&mut self, op: impl Into<Operation>, ty: Type) -> Val {
        let out = *self.builder.scope.create_local(ty);
        self.builder.scope.register(Instruction::new(op, out));
        Val(out)
    }

    /// `op(x)`
    pub(crate) fn unary(&mut self, op: Un, x: Val) -> Val {
        let input = UnaryOperator { input: x.0 };
        let op = match op {
            Un::Neg => Arithmetic::Neg(input),
            Un::Abs => Arithmetic::Abs(input),
            Un::Exp => Arithmetic::Exp(input),
            Un::Ln => Arithmetic::Log(input),
            Un::Sqrt => Arithmetic::Sqrt(input),
            Un::Rsqrt => Arithmetic::InverseSqrt(input),
            Un::Tanh => Arithmetic::Tanh(input),
            Un::Sin => Arithmetic::Sin(input),
            Un::Cos => Arithmetic::Cos(input),
        };
        self.push_as(op, x.0.ty)
    }

    /// `exp(x)` to within `2 + 1.2 |x|` units in the last place, by the fastest instruction that there is.
    pub(crate) fn quick_exp(&mut self, x: Val) -> Val {
        let quick = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf;
        let before = self.builder.scope.modes.replace(InstructionModes { fp_math_mode: quick });
        let y = self.unary(Un::Exp, x);
        self.builder.scope.modes.replace(before);
        y
    }

    /// `a op b`
    pub(crate) fn binary(&mut self, op: Bin, a: Val, b: Val) -> Val {
        debug_assert_eq!(a.0.ty, b.0.ty, "{op:?} of two types");
        if let Some(done) = self.fold(op, a, b) {
            return done;
        }
        let ops = BinaryOperator { lhs: a.0, rhs: b.0 };
        let op = match op {
            Bin::Add => Arithmetic::Add(ops),
            Bin::Sub => Arithmetic::Sub(ops),
            Bin::Mul => Arithmetic::Mul(ops),
            Bin::Div => Arithmetic::Div(ops),
            // `Modulo` prints as `%`. `Remainder` goes through f32 division, which is wrong beyond 2^24.
            Bin::Rem => Arithmetic::Modulo(ops),
            Bin::Max => Arithmetic::Max(ops),
            Bin::Min => Arithmetic::Min(ops),
        };
        self.push_as(op, a.0.ty)
    }

    /// Unsigned arithmetic that needs no instruction.
    fn fold(&self, op: Bin, a: Val, b: Val) -> Option<Val> {
        let fits = |n: u64| u32::try_from(n).ok().map(|n| self.u32(n));
        match (op, a.known(), b.known()) {
            (Bin::Add, Some(x), Some(y)) => fits(x + y),
            (Bin::Mul, Some(x), Some(y)) => fits(x * y),
            (Bin::Div, Some(x), Some(y)) if y > 0 => fits(x / y),
            (Bin::Rem, Some(x), Some(y)) if y > 0 => fits(x % y),
            (Bin::Add, Some(0), _) | (Bin::Mul, Some(1), _) => Some(b),
            (Bin::Add | Bin::Sub, _, Some(0)) | (Bin::Mul | Bin::Div, _, Some(1)) => Some(a),
            (Bin::Mul, Some(0), _) | (Bin::Mul, _, Some(0)) | (Bin::Rem, _, Some(1)) => fits(0),
            _ => None,
        }
    }

    /// `a + b`
    pub(crate) fn add(&mut self, a: Val, b: Val) -> Val {
        self.binary(Bin::Add, a, b)
    }

    /// `a - b`
    pub(crate) fn sub(&mut self, a: Val, b: Val) -> Val {
        self.binary(Bin::Sub, a, b)
    }

    /// `a · b`
    pub(crate) fn mul(&mut self, a: Val, b: Val) -> Val {
        self.binary(Bin::Mul, a, b)
    }

    /// `a / b`
    pub(crate) fn div(&mut self, a: Val, b: Val) -> Val {
        self.binary(Bin::Div, a, b)
    }

    /// `a % b`
    pub(crate) fn rem(&mut self, a: Val, b: Val) -> Val {
        self.binary(Bin::Rem, a, b)
    }

    /// How many tiles of that size hold so many.
    pub(crate) fn tiles(&mut self, total: Val, tile: u32) -> Val {
        let (rounding, tile) = (self.u32(tile - 1), self.u32(tile));
        let sum = self.add(total, rounding);
        self.div(sum, tile)
    }

    /// An operation on bits. A shift is by less than 32.
    pub(crate) fn bits(&mut self, op: Bits, a: Val, b: Val) -> Val {
        debug_assert_eq!(a.0.ty, b.0.ty, "{op:?} of two types");
        match (op, a.known(), b.known()) {
            (Bits::Left | Bits::Right | Bits::Or, _, Some(0)) => return a,
            (Bits::Or, Some(0), _) => return b,
            _ => {}
        }
        let ops = BinaryOperator { lhs: a.0, rhs: b.0 };
        let op = match op {
            Bits::And => Bitwise::BitwiseAnd(ops),
            Bits::Or => Bitwise::BitwiseOr(ops),
            Bits::Xor => Bitwise::BitwiseXor(ops),
            Bits::Left => Bitwise::ShiftLeft(ops),
            Bits::Right => Bitwise::ShiftRight(ops),
        };
        self.push_as(op, a.0.ty)
    }

    /// `a · b + c`, fused where the target can.
    pub(crate) fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        self.push_as(Arithmetic::Fma(FmaOperator { a: a.0, b: b.0, c: c.0 }), a.0.ty)
    }

    /// Compares.
    pub(crate) fn cmp(&mut self, op: Cmp, a: Val, b: Val) -> Val {
        debug_assert_eq!(a.0.ty, b.0.ty, "{op:?} of two types");
        let ops = BinaryOperator { lhs: a.0, rhs: b.0 };
        let op = match op {
            Cmp::Lt => Comparison::Lower(ops),
            Cmp::Le => Comparison::LowerEqual(ops),
            Cmp::Eq => Comparison::Equal(ops),
            Cmp::Ne => Comparison::NotEqual(ops),
            Cmp::Gt => Comparison::Greater(ops),
        };
        self.push(op, Elem::Bool)
    }

    /// `a < b`
    pub(crate) fn lt(&mut self, a: Val, b: Val) -> Val {
        self.cmp(Cmp::Lt, a, b)
    }

    /// `a ∧ b`; both are evaluated.
    pub(crate) fn and(&mut self, a: Val, b: Val) -> Val {
        self.push(Operator::And(BinaryOperator { lhs: a.0, rhs: b.0 }), Elem::Bool)
    }

    /// `a ∨ b`; both are evaluated.
    pub(crate) fn or(&mut self, a: Val, b: Val) -> Val {
        self.push(Operator::Or(BinaryOperator { lhs: a.0, rhs: b.0 }), Elem::Bool)
    }

    /// `¬a`
    pub(crate) fn not(&mut self, a: Val) -> Val {
        self.push(Operator::Not(UnaryOperator { input: a.0 }), Elem::Bool)
    }

    /// `c ? a : b`; both are evaluated.
    pub(crate) fn select(&mut self, c: Val, a: Val, b: Val) -> Val {
        debug_assert_eq!(a.0.ty, b.0.ty, "select of two types");
        self.push_as(Operator::Select(Select { cond: c.0, then: a.0, or_else: b.0 }), a.0.ty)
    }

    /// Converts a number or truth value; anything but 0 is true.
    pub(crate) fn cast(&mut self, x: Val, to: Elem) -> Val {
        if x.0.ty == to.ty() {
            return x;
        }
        if to == Elem::Bool {
            let zero = Val(match x.0.ty.elem_type() {
                ElemType::Float(_) => Variable::constant(ConstantValue::Float(0.0), x.0.ty),
                ElemType::Int(_) => Variable::constant(ConstantValue::Int(0), x.0.ty),
                ElemType::UInt(_) | ElemType::Bool => Variable::constant(ConstantValue::UInt(0), x.0.ty),
            });
            return self.cmp(Cmp::Ne, x, zero);
        }
        self.push(Operator::Cast(UnaryOperator { input: x.0 }), to)
    }

    // --- registers ---------------------------------------------------------------------------------

    /// A register with a first value.
    pub(crate) fn var(&mut self, init: Val) -> Var {
        // Not from CubeCL's pool of locals: it declares them in the order of a hash map.
        let var = *self.builder.scope.create_local_restricted(init.0.ty);
        self.builder.scope.add_local_mut(var);
        let var = Var(var);
        self.set(var, init);
        var
    }

    /// The register's value now; it does not follow later writes.
    pub(crate) fn get(&mut self, var: Var) -> Val {
        self.push_as(Operation::Copy(var.0), var.0.ty)
    }

    /// Writes the register.
    pub(crate) fn set(&mut self, var: Var, value: Val) {
        debug_assert_eq!(var.0.ty, value.0.ty, "assignment of two types");
        self.builder.scope.register(Instruction::new(Operation::Copy(value.0), var.0));
    }

    // --- memory ------------------------------------------------------------------------------------

    /// Memory of the cube, undefined at first.
    pub(crate) fn shared(&mut self, elem: Elem, len: usize) -> Shared {
        // CubeCL lays arrays out in any order: at multiples of 16 bytes the total is always the same.
        let len = len.next_multiple_of(16 / elem.bytes());
        Shared(*self.builder.scope.create_shared_array(elem.ty(), len, None))
    }

    /// Makes shared arrays of so many elements that all kernels of the grid have: no cube is for two of them.
    pub(crate) fn in_common(&mut self, arrays: &[(Elem, usize)]) {
        for &(elem, len) in arrays {
            let memory = self.shared(elem, len);
            self.common.push((elem, memory, false));
        }
    }

    /// The next of these with such elements.
    ///
    /// # Panics
    /// If the kernel has taken all of them.
    pub(crate) fn common(&mut self, elem: Elem) -> Shared {
        let mut free = self.common.iter_mut().filter(|(of, _, taken)| *of == elem && !taken);
        let (_, memory, taken) = free.next().expect("there are as many as the launch says");
        *taken = true;
        *memory
    }

    /// The same from a multiple of so many bytes on.
    pub(crate) fn shared_at(&mut self, elem: Elem, len: usize, multiple: usize) -> Shared {
        Shared(*self.builder.scope.create_shared_array(elem.ty(), len, Some(multiple)))
    }

    /// `memory[index]` as it is stored. Nothing checks the index.
    pub(crate) fn load(&mut self, memory: impl Memory, index: Val) -> Val {
        let list = memory.variable();
        let op = IndexOperator { list, index: index.0, vector_size: 0, unroll_factor: 1 };
        self.push_as(Operator::Index(op), list.ty)
    }

    /// `memory[index] = value`, converted. Nothing checks the index.
    pub(crate) fn store(&mut self, memory: impl Memory, index: Val, value: Val) {
        let list = memory.variable();
        let value = self.convert(value, list.ty);
        let op = IndexAssignOperator { index: index.0, value: value.0, vector_size: 0, unroll_factor: 1 };
        self.builder.scope.register(Instruction::new(Operator::IndexAssign(op), list));
    }

    fn convert(&mut self, value: Val, ty: Type) -> Val {
        if value.0.ty == ty {
            return value;
        }
        self.push_as(Operator::Cast(UnaryOperator { input: value.0 }), ty)
    }

    /// `width` elements behind one another, from `index` times as many on: one access if there are vectors on the target.
    pub(crate) fn load_pack(&mut self, memory: impl Memory, index: Val, width: u32, vectors: bool) -> Pack {
        let list = memory.variable();
        if width > 1 && vectors {
            let op = IndexOperator { list, index: index.0, vector_size: width as usize, unroll_factor: 1 };
            return Pack::Vector(self.push_as(Operator::Index(op), list.ty.with_vector_size(width as usize)));
        }
        let width_val = self.u32(width);
        let first = self.mul(index, width_val);
        let elements = (0..width).map(|n| {
            let n = self.u32(n);
            let at = self.add(first, n);
            self.load(memory, at)
        });
        Pack::Elements(elements.collect())
    }

    /// An element of a pack.
    pub(crate) fn element_of(&mut self, pack: &Pack, n: u32) -> Val {
        match pack {
            Pack::Elements(elements) => elements[n as usize],
            Pack::Vector(vector) => {
                let index = self.u32(n);
                let op = IndexOperator { list: vector.0, index: index.0, vector_size: 0, unroll_factor: 1 };
                self.push_as(Operator::Index(op), vector.0.ty.with_vector_size(1))
            }
        }
    }

    /// Registers with a first value.
    pub(crate) fn pack_var(&mut self, init: &Pack) -> Vec<Var> {
        match init {
            Pack::Vector(x) => vec![self.var(*x)],
            Pack::Elements(x) => x.iter().map(|&x| self.var(x)).collect(),
        }
    }

    /// What these registers hold now, in the form of `like`.
    pub(crate) fn get_pack(&mut self, vars: &[Var], like: &Pack) -> Pack {
        match like {
            Pack::Vector(_) => Pack::Vector(self.get(vars[0])),
            Pack::Elements(_) => Pack::Elements(vars.iter().map(|&v| self.get(v)).collect()),
        }
    }

    /// Writes these registers.
    pub(crate) fn set_pack(&mut self, vars: &[Var], value: &Pack) {
        match value {
            Pack::Vector(x) => self.set(vars[0], *x),
            Pack::Elements(x) => vars.iter().zip(x).for_each(|(&v, &x)| self.set(v, x)),
        }
    }

    /// Writes elements behind one another, from `index` times as many on.
    pub(crate) fn store_pack(&mut self, memory: impl Memory, index: Val, pack: &Pack) {
        let list = memory.variable();
        match pack {
            Pack::Vector(x) => {
                let vector_size = x.0.ty.vector_size();
                let op = IndexAssignOperator { index: index.0, value: x.0, vector_size, unroll_factor: 1 };
                self.builder.scope.register(Instruction::new(Operator::IndexAssign(op), list));
            }
            Pack::Elements(elements) => {
                let width = self.u32(elements.len() as u32);
                let first = self.mul(index, width);
                for (n, &x) in elements.iter().enumerate() {
                    let n = self.u32(n as u32);
                    let at = self.add(first, n);
                    self.store(memory, at, x);
                }
            }
        }
    }

    /// Writes numbers behind one another, converted, from `index` times as many on, in one access.
    pub(crate) fn store_numbers(&mut self, memory: impl Memory, index: Val, numbers: &[Val]) {
        let ty = memory.variable().ty;
        let inputs = numbers.iter().map(|&x| self.convert(x, ty).0).collect();
        let vector = self
            .push_as(Operator::InitVector(VectorInitOperator { inputs }), ty.with_vector_size(numbers.len()));
        self.store_pack(memory, index, &Pack::Vector(vector));
    }

    /// So many numbers as they are stored, from one on, which is a multiple of how many they are: in as few accesses as there are.
    pub(crate) fn load_beside(&mut self, memory: impl Memory, at: Val, count: u32) -> Vec<Val> {
        let width = beside(memory, count);
        let of_access = self.u32(width);
        let at = self.div(at, of_access);
        let mut numbers = Vec::new();
        for n in 0..count / width {
            let n = self.u32(n);
            let at = self.add(at, n);
            let pack = self.load_pack(memory, at, width, true);
            numbers.extend((0..width).map(|n| self.element_of(&pack, n)));
        }
        numbers
    }

    /// Writes numbers, converted, where [`load_beside`](Emit::load_beside) would read them.
    pub(crate) fn store_beside(&mut self, memory: impl Memory, at: Val, numbers: &[Val]) {
        let width = beside(memory, numbers.len() as u32);
        let of_access = self.u32(width);
        let at = self.div(at, of_access);
        for (n, numbers) in numbers.chunks(width as usize).enumerate() {
            let n = self.u32(n as u32);
            let at = self.add(at, n);
            match numbers {
                [one] => self.store(memory, at, *one),
                several => self.store_numbers(memory, at, several),
            }
        }
    }

    /// Zeros, in one register.
    pub(crate) fn zero_pack(&mut self, elem: Elem, width: u32) -> Pack {
        let zero = Variable::constant(ConstantValue::Float(0.0), elem.ty());
        let ty = elem.ty().with_vector_size(width as usize);
        Pack::Vector(self.push_as(Operator::Cast(UnaryOperator { input: zero }), ty))
    }

    /// Numbers side by side in one register, converted.
    pub(crate) fn vector(&mut self, elem: Elem, numbers: &[Val]) -> Val {
        let inputs = numbers.iter().map(|&x| self.convert(x, elem.ty()).0).collect();
        let ty = elem.ty().with_vector_size(numbers.len());
        self.push_as(Operator::InitVector(VectorInitOperator { inputs }), ty)
    }

    /// The same as a pack.
    pub(crate) fn pack(&mut self, elem: Elem, numbers: &[Val]) -> Pack {
        Pack::Vector(self.vector(elem, numbers))
    }

    /// Registers for so many vectors.
    pub(crate) fn array(&mut self, elem: Elem, width: usize, len: usize) -> Array {
        Array(*self.builder.scope.create_local_array(elem.ty().with_vector_size(width), len))
    }

    /// CUDA's `ldmatrix`: 2 or 4 matrices of 8 by 8 elements of 16 bits, of which each unit of a plane names a row.
    pub(crate) fn load_matrix(&mut self, to: Array, from: Shared, at: Val, matrices: usize, transpose: bool) {
        let op = CoopMma::LoadMatrix {
            buffer: from.0,
            offset: at.0,
            vector_size: None,
            factor: matrices,
            transpose,
        };
        self.builder.scope.register(Instruction::new(op, to.0));
    }

    /// CUDA's `mma`: adds the product of 16 by 16 and 16 by 8 elements of that type to sums in f32.
    pub(crate) fn multiply_matrices(&mut self, a: Array, b: Array, sum: Array, elem: Elem) {
        let layout = MatrixLayout::ColMajor;
        let matrix = Matrix { ident: MatrixIdent::A, m: 16, n: 8, k: 16, storage: elem.storage(), layout };
        let op = CoopMma::ExecuteManual { matrix, registers_a: a.0, registers_b: b.0, registers_c: sum.0 };
        self.builder.scope.register(Instruction::new(op, sum.0));
    }

    /// Begins to copy 16 bytes from memory into shared memory, or nothing and zeros where they do not exist: CUDA's `cp.async`. Both
    /// places are multiples of 16 bytes, in elements. What is copied is not there before [`await_copies`](Emit::await_copies).
    pub(crate) fn copy_ahead(&mut self, exists: Val, from: Buf, at: Val, to: Shared, place: Val) {
        let (zero, all) = (self.u32(0), self.u32((16 / from.0.ty.size()) as u32));
        let (length, at) = (self.select(exists, all, zero), self.select(exists, at, zero));
        let op = BarrierOps::CopyAsync {
            source: from.0,
            source_length: length.0,
            offset_source: at.0,
            offset_out: place.0,
            copy_length: 16,
            checked: true,
        };
        self.builder.scope.register(Instruction::new(op, to.0));
    }

    /// The same of so many elements that exist, which are 4, 8 or 16 bytes.
    pub(crate) fn copy_whole_ahead(&mut self, from: Buf, at: Val, to: Shared, place: Val, width: u32) {
        let all = self.u32(width);
        let op = BarrierOps::CopyAsync {
            source: from.0,
            source_length: all.0,
            offset_source: at.0,
            offset_out: place.0,
            copy_length: width * from.0.ty.size() as u32,
            checked: false,
        };
        self.builder.scope.register(Instruction::new(op, to.0));
    }

    /// Waits for all copies that this unit has begun. Those of other units are there when these have waited and all have met.
    pub(crate) fn await_copies(&mut self) {
        self.of_copies("wait_all");
    }

    /// Makes a group of the copies that this unit has begun since the last one.
    pub(crate) fn group_copies(&mut self) {
        self.of_copies("commit_group");
    }

    /// As [`await_copies`](Emit::await_copies) for all groups but so many, the last ones.
    pub(crate) fn await_groups_but(&mut self, last: u32) {
        self.of_copies(&format!("wait_group {last}"));
    }

    fn of_copies(&mut self, what: &str) {
        self.builder.scope.register(NonSemantic::Comment { content: format!("{COPIES}{what}") });
    }

    /// An instruction of groups of planes, by its word and numbers, with the registers and the places in shared memory that it names.
    pub(super) fn of_groups(&mut self, word: &str, registers: &[Array], places: &[(Shared, Val)]) {
        let registers = registers.iter().map(|r| r.0);
        let places = places.iter().flat_map(|(memory, at)| [memory.0, at.0]);
        self.unnamed(word, registers.chain(places).collect());
    }

    /// Waits until a barrier in shared memory has been passed as often as the parity says: see [`bulk`](super::bulk).
    pub(super) fn await_barrier(&mut self, (memory, at): (Shared, Val), parity: Val) {
        self.unnamed("await", vec![memory.0, at.0, parity.0]);
    }

    /// Asks for a box of an operand, by the number of its map, from an index on (its innermost part first). It goes to a place in shared
    /// memory, and its bytes count at a barrier.
    pub(super) fn bring_box(
        &mut self,
        map: usize,
        (memory, place): (Shared, Val),
        (barriers, barrier): (Shared, Val),
        at: &[Val],
    ) {
        let places = [memory.0, place.0, barriers.0, barrier.0];
        self.unnamed(&format!("bring {map}"), places.into_iter().chain(at.iter().map(|v| v.0)).collect());
    }

    /// An instruction that CubeCL has no name for. It is printed, so that CubeCL itself says what its operands are called in the text.
    fn unnamed(&mut self, word: &str, args: Vec<Variable>) {
        let format_string = format!("{GROUPS}{word}");
        self.builder.scope.register(NonSemantic::Print { format_string, args });
    }

    /// Lets the grid behind this one begin: see [`overlap`](super::overlap).
    pub(crate) fn let_next_begin(&mut self) {
        self.builder.scope.register(NonSemantic::Comment { content: format!("{GRIDS}next") });
    }

    /// Waits until the grids before this one are done, and what they wrote is there. All units of a cube that touch memory which these
    /// may write must have come here before.
    pub(crate) fn await_grids(&mut self) {
        self.builder.scope.register(NonSemantic::Comment { content: format!("{GRIDS}wait") });
    }

    /// The same as [`load_pack`](Emit::load_pack) of 16 bytes, read here and not where they are wanted: compilers move what reads from memory
    /// that nobody writes behind barriers, to save registers. CUDA only.
    pub(crate) fn load_pack_now(&mut self, memory: Buf, index: Val, width: u32) -> Pack {
        self.builder.scope.register(NonSemantic::Comment { content: format!("{GRIDS}load") });
        self.load_pack(memory, index, width, true)
    }

    /// Waits at a barrier, by its number, for as many units as meet there: those that wait, and those that [have come
    /// by](Emit::come_by). All units of a plane must come here. [`sync`](Emit::sync) has the number 0.
    pub(super) fn meet(&mut self, barrier: Val, units: u32) {
        self.unnamed(&format!("meet {units}"), vec![barrier.0]);
    }

    /// Tells those who wait at a barrier that this unit has come by, and goes on.
    pub(super) fn come_by(&mut self, barrier: Val, units: u32) {
        self.unnamed(&format!("come-by {units}"), vec![barrier.0]);
    }

    /// `2^x` to within 2 units in the last place, by the instruction of CUDA devices; 0 where that is less than any normal number.
    pub(super) fn quick_exp2(&mut self, x: Val) -> Val {
        let y = self.var(x);
        self.unnamed("ex2", vec![y.0]);
        self.get(y)
    }

    /// Asks for so few registers that this many cubes fit on a processor, and for no fewer. Unless it is told, `ptxas` may give a kernel
    /// so few that more of them fit, whatever shared memory says, and spill what has no room.
    pub(crate) fn cubes_at_once(&mut self, count: u32) {
        // CubeCL has no name for it: see `source`.
        self.builder.scope.register(NonSemantic::Comment { content: format!("{CUBES}{count}") });
    }

    /// The value of the unit whose number in the plane differs in these bits. All units of the plane must come here.
    pub(crate) fn shuffle_xor(&mut self, value: Val, bits: u32) -> Val {
        let bits = self.u32(bits);
        self.push_as(Plane::ShuffleXor(BinaryOperator { lhs: value.0, rhs: bits.0 }), value.0.ty)
    }

    // --- control -----------------------------------------------------------------------------------

    /// `if c { body }`
    pub(crate) fn if_(&mut self, c: Val, body: impl FnOnce(&mut Emit)) {
        let scope = self.nested(body);
        self.builder.scope.register(Branch::If(Box::new(If { cond: c.0, scope })));
    }

    /// `for i in (from..to).step_by(step) { body(i) }`
    pub(crate) fn for_step(&mut self, from: Val, to: Val, step: Val, body: impl FnOnce(&mut Emit, Val)) {
        match (from.known(), to.known()) {
            (Some(from), Some(to)) if from >= to => return,
            (Some(0), Some(1)) => return body(self, from),
            _ => {}
        }
        let i = *self.builder.scope.create_local_restricted(from.0.ty);
        let scope = self.nested(|e| body(e, Val(i)));
        let step = (step.known() != Some(1)).then_some(step.0);
        let range = RangeLoop { i, start: from.0, end: to.0, step, inclusive: false, scope };
        self.builder.scope.register(Branch::RangeLoop(Box::new(range)));
    }

    /// Waits for all units of the cube. Every unit must come here, or none.
    pub(crate) fn sync(&mut self) {
        self.builder.scope.register(Synchronization::SyncCube);
    }

    /// Emits into a scope of its own and returns it.
    fn nested(&mut self, body: impl FnOnce(&mut Emit)) -> Scope {
        let child = self.builder.scope.child();
        let parent = std::mem::replace(&mut self.builder.scope, child);
        body(self);
        std::mem::replace(&mut self.builder.scope, parent)
    }

    /// Folds one value per unit over the cube, and gives every unit the result. `units` is a power of two, the length of `scratch` at
    /// least. On CUDA each plane folds its values by itself, and every unit what the planes have found; elsewhere it is a tree.
    pub(crate) fn fold_cube(
        &mut self,
        op: Bin,
        value: Val,
        scratch: Shared,
        (units, target): (u32, Target),
    ) -> Val {
        let (unit, zero) = (self.unit(), self.u32(0));
        let result = if target == Target::Cuda && units.is_multiple_of(PLANE) {
            let whole = self.fold_plane(op, value);
            let plane = self.u32(PLANE);
            let (number, lane) = (self.div(unit, plane), self.rem(unit, plane));
            let first = self.cmp(Cmp::Eq, lane, zero);
            self.if_(first, |e| e.store(scratch, number, whole));
            self.sync();
            let parts: Vec<_> = (0..units / PLANE)
                .map(|n| {
                    let n = self.u32(n);
                    self.load(scratch, n)
                })
                .collect();
            parts.into_iter().reduce(|a, b| self.binary(op, a, b)).expect("a cube has planes")
        } else {
            self.fold_groups(op, value, scratch, unit, units);
            self.load(scratch, zero)
        };
        // The scratch may be written again at once.
        self.sync();
        result
    }

    /// Folds one value per unit of a plane of 32, where there are such, and gives each of them the result.
    pub(crate) fn fold_plane(&mut self, op: Bin, value: Val) -> Val {
        [16, 8, 4, 2, 1].into_iter().fold(value, |whole, bits| {
            let other = self.shuffle_xor(whole, bits);
            self.binary(op, whole, other)
        })
    }

    /// Folds one value per unit over groups of units side by side, into the scratch at each group's first unit. `lane` is the
    /// unit's place in its group, `width` the size of all, a power of two. Before the scratch is written again, units must wait.
    pub(crate) fn fold_groups(&mut self, op: Bin, value: Val, scratch: Shared, lane: Val, width: u32) {
        let unit = self.unit();
        self.store(scratch, unit, value);
        self.sync();
        let mut width = width / 2;
        while width > 0 {
            let half = self.u32(width);
            let active = self.lt(lane, half);
            self.if_(active, |e| {
                let other = e.add(unit, half);
                let a = e.load(scratch, unit);
                let b = e.load(scratch, other);
                let both = e.binary(op, a, b);
                e.store(scratch, unit, both);
            });
            self.sync();
            width /= 2;
        }
    }
}
