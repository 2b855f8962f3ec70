//! What is wide: where it lies in memory, how packs of it are read, and what their elements are.
//!
//! A pack of elements is one access. A pack of codes is two: the words that hold them, and the scale that all of them have. What a code stands
//! for is made in registers, but for its scale, by which what has been summed of a pack is multiplied once.

use latentc_ir::{Function, ValueId};

use super::{Few, PACK_BYTES};
use crate::coded::{Coded, Table};
use crate::cube::emit::{Bits, Buf, Elem, Emit, Pack, Val};
use crate::cube::target::Target;
use crate::few::FewProduct;

/// Bytes that CUDA can copy past the registers at once.
const COPIED: [usize; 3] = [4, 8, 16];
/// The bits of 2^23, from which on the last bit of an f32 is one.
const WHOLE: u32 = 0x4b00_0000;

/// One of the tensors that a wide operand is held in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) value: ValueId,
    pub(super) elem: Elem,
    /// What a pack has of it, side by side.
    pub(super) width: u32,
    /// Packs that have the same.
    shared: u32,
}

impl Part {
    /// Those of a product's wide operand, for packs of so many elements.
    pub(super) fn of(body: &Function, product: &FewProduct, pack: u32, target: Target) -> Vec<Part> {
        let part = |value: ValueId, width, shared| {
            let elem = target.stored(body.ty(value).dtype).expect("checked for this target");
            Part { value, elem, width, shared }
        };
        match product.table {
            Table::Elements(elements) => vec![part(elements, pack, 1)],
            Table::Codes(Coded { group, fields, .. }, [words, scales]) => {
                vec![part(words, pack / fields as u32, 1), part(scales, 1, group as u32 / pack)]
            }
        }
    }

    /// Bytes of a pack.
    pub(super) fn bytes(&self) -> usize {
        self.width as usize * self.elem.bytes()
    }

    /// Whether a device can copy it past the registers.
    pub(super) fn is_copied(&self, target: Target) -> bool {
        target == Target::Cuda && COPIED.contains(&self.bytes())
    }

    /// Where a pack lies in it, in accesses.
    pub(super) fn at(&self, e: &mut Emit, pack: Val) -> Val {
        let shared = e.u32(self.shared);
        e.div(pack, shared)
    }

    /// Whether it is of the 16 bytes that CUDA can be told when to read.
    fn is_whole(&self, target: Target) -> bool {
        target == Target::Cuda && self.bytes() as u64 == PACK_BYTES
    }
}

/// A wide operand at one index of the batch and the outer axes.
pub(super) struct Wide {
    /// Where it begins, in elements.
    pub(super) base: Val,
    /// Whether the index that chooses it is one of the axis.
    pub(super) exists: Option<Val>,
}

/// A pack in registers.
pub(super) struct Read<'r> {
    pack: &'r Pack,
    codes: Option<(Coded, &'r Pack)>,
}

impl Read<'_> {
    /// An element, without its scale.
    pub(super) fn number(&self, e: &mut Emit, n: u32) -> Val {
        let Some((Coded { fields, centre, .. }, _)) = self.codes else {
            let element = e.element_of(self.pack, n);
            return e.cast(element, Elem::F32);
        };
        let (word, field, width) = (n / fields as u32, n % fields as u32, 32 / fields as u32);
        let word = e.element_of(self.pack, word);
        let word = e.cast(word, Elem::U32);
        let (by, mask, whole) = (e.u32(field * width), e.u32((1 << width) - 1), e.u32(WHOLE));
        let code = e.bits(Bits::Right, word, by);
        let code = e.bits(Bits::And, code, mask);
        // The last bits of 2^23 and a code are the code: no conversion, of which devices do a few at a time.
        let bits = e.bits(Bits::Or, code, whole);
        let (shifted, zero) = (e.as_float(bits), e.f32(f32::from_bits(WHOLE) + centre as f32));
        e.sub(shifted, zero)
    }

    /// What all elements are to be multiplied by, if they have a scale.
    pub(super) fn scale(&self, e: &mut Emit) -> Option<Val> {
        let (_, scale) = self.codes?;
        let scale = e.element_of(scale, 0);
        Some(e.cast(scale, Elem::F32))
    }
}

impl Few<'_> {
    /// Reads packs, each of a product and with its place, into registers: all of their parts.
    pub(super) fn load_all(&self, e: &mut Emit, packs: &[(usize, Val)]) -> Vec<Pack> {
        let parts = packs.iter().flat_map(|&(p, at)| self.wides[p].iter().map(move |part| (part, at)));
        parts.map(|((part, buf), at)| self.load(e, part, *buf, at)).collect()
    }

    /// A pack of a part. Where several kernels with many columns a plane share a grid, registers are too few to hold what is read early: the
    /// compiler would keep it on the stack.
    fn load(&self, e: &mut Emit, part: &Part, buf: Buf, pack: Val) -> Pack {
        let at = part.at(e, pack);
        let crowded = e.shares_grid() && self.t.each > 2;
        if part.is_whole(self.target) && !crowded {
            return e.load_pack_now(buf, at, part.width);
        }
        e.load_pack(buf, at, part.width, self.vectors())
    }

    /// What has been read, as packs again.
    pub(super) fn reads<'r>(&self, mut parts: &'r [Pack]) -> Vec<Read<'r>> {
        let mut reads = Vec::new();
        while !parts.is_empty() {
            let p = reads.len() / self.t.each as usize % self.wides.len();
            let (own, others) = parts.split_at(self.wides[p].len());
            let codes = match self.plan.products[p].table {
                Table::Elements(_) => None,
                Table::Codes(coded, _) => Some((coded, &own[1])),
            };
            reads.push(Read { pack: &own[0], codes });
            parts = others;
        }
        reads
    }
}
