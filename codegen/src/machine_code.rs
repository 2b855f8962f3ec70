//! What the machine code of a kernel is made of: how a device will run it, told by its compilers alone.
//!
//! Figures are *static*: an instruction counts once, however often it runs. They show at a glance what a change of a
//! kernel did (registers that spill, accesses that are no longer wide, tensor cores that are not used), not how long it takes.

use rayon::prelude::*;
use serde::Serialize;

use crate::cube::Machine;
use crate::joined::{Told, told};
use crate::nvrtc::{Nvrtc, NvrtcError, Resources, Toolkit};

/// What a multiprocessor of an architecture has room for: CUDA C++ Programming Guide, compute capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// As compilers call it.
    pub name: &'static str,
    /// Bytes of shared memory of a multiprocessor.
    shared: u32,
    /// Whether groups of planes multiply together.
    pub groups: bool,
}

/// Those that kernels are looked at for: Ampere, Hopper and Blackwell of data centres.
pub const ARCHS: [Arch; 3] = [
    Arch { name: "sm_80", shared: 164 << 10, groups: false },
    Arch { name: "sm_90a", shared: 228 << 10, groups: true },
    Arch { name: "sm_100", shared: 228 << 10, groups: false },
];

/// Threads of a warp, and for each multiprocessor warps, blocks and registers; the same for all of [`ARCHS`].
const WARP: u32 = 32;
const WARPS: u32 = 64;
const BLOCKS: u32 = 32;
const REGISTERS: u32 = 64 << 10;
/// Registers are given to a warp in pieces of so many.
const REGISTER_PIECE: u32 = 256;
/// Shared memory of a block that the system keeps, and the pieces that it is given in.
const SHARED_RESERVED: u32 = 1 << 10;
const SHARED_PIECE: u32 = 128;

impl Arch {
    /// A device of it, as the choice among ways asks.
    pub fn machine(&self) -> Machine {
        let shared_bytes = (self.shared - SHARED_RESERVED) as usize;
        Machine { shared_bytes, groups: self.groups, ..Machine::HOPPER }
    }

    /// The share of a multiprocessor's warps that can be there at once.
    pub fn occupancy(&self, units: u32, registers: u32, shared_bytes: u32) -> f64 {
        let warps = units.div_ceil(WARP).max(1);
        let by_registers = match (registers * WARP).next_multiple_of(REGISTER_PIECE) {
            0 => BLOCKS,
            warp => REGISTERS / warp / warps,
        };
        let by_shared = self.shared / (shared_bytes + SHARED_RESERVED).next_multiple_of(SHARED_PIECE);
        let blocks = (WARPS / warps).min(BLOCKS).min(by_registers).min(by_shared);
        f64::from(blocks * warps) / f64::from(WARPS)
    }
}

/// A kernel as an architecture's machine runs it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineCode {
    /// The architecture.
    pub arch: &'static str,
    /// Registers, stack and spills of a thread.
    pub resources: Resources,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// The share of a multiprocessor's warps that can be there at once.
    pub occupancy: f64,
    /// What the code consists of.
    pub instructions: Instructions,
}

/// Instructions, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Instructions {
    /// All.
    pub total: u32,
    /// Loads and stores of global memory.
    pub global: u32,
    /// Those of them that move 16 bytes a thread, or a whole tile.
    pub wide: u32,
    /// Products of tensor cores.
    pub tensor: u32,
    /// Loads and stores of a thread's stack.
    pub local: u32,
}

impl Instructions {
    /// The share of accesses to global memory that are as wide as they can be; `None` if there are none.
    pub fn wide_share(&self) -> Option<f64> {
        (self.global > 0).then(|| f64::from(self.wide) / f64::from(self.global))
    }

    /// From the text of `cuobjdump -sass`.
    fn read(text: &str) -> Instructions {
        let mut counts = Instructions::default();
        for mnemonic in text.lines().filter_map(mnemonic) {
            let mut parts = mnemonic.split('.');
            let op = parts.next().unwrap_or_default();
            counts.total += 1;
            match op {
                "LDG" | "STG" | "LDGSTS" | "LD" | "ST" | "ATOMG" | "RED" | "REDG" => {
                    counts.global += 1;
                    counts.wide += u32::from(parts.any(|p| p == "128"));
                }
                // Bulk copies of Hopper and later.
                "UBLKCP" | "UTMALDG" | "UTMASTG" | "UTMAREDG" => {
                    counts.global += 1;
                    counts.wide += 1;
                }
                "LDL" | "STL" => counts.local += 1,
                _ if op.ends_with("MMA") => counts.tensor += 1,
                _ => {}
            }
        }
        counts
    }
}

/// The operation of a line such as `/*0010*/ @!P0 LDG.E.128 R4, … ;`.
fn mnemonic(line: &str) -> Option<&str> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut words = rest.split_whitespace();
    let word = words.find(|w| !w.starts_with('@'))?;
    // The words of an encoding stand in comments.
    (!word.starts_with("/*")).then(|| word.trim_end_matches(';'))
}

/// A kernel's text, and what its launch has.
#[derive(Clone, Copy, Debug)]
pub struct Launched<'s> {
    /// CUDA C++.
    pub text: &'s str,
    /// Units of a cube.
    pub units: u32,
    /// Bytes of shared memory.
    pub shared_bytes: u32,
}

/// Compiles kernels for an architecture and looks at what came of them, in their order; by all cores. For each, or what the compilers say.
pub fn machine_codes(
    (nvrtc, toolkit): (&Nvrtc, &Toolkit),
    kernels: &[Launched<'_>],
    arch: &Arch,
) -> Vec<Result<MachineCode, NvrtcError>> {
    let compiled: Vec<_> = kernels.par_iter().map(|k| nvrtc.compile(k.text, arch.name)).collect();
    let accepted: Vec<_> = compiled.iter().flatten().cloned().collect();
    let mut told = told(toolkit, &accepted, arch.name).into_iter();
    let one = |(ptx, kernel): (Result<String, NvrtcError>, &Launched<'_>)| {
        ptx?;
        let Told { resources, instructions } = told.next().expect("one for each that is accepted")?;
        Ok(MachineCode::of(arch, resources, &instructions, kernel.units, kernel.shared_bytes))
    };
    compiled.into_iter().zip(kernels).map(one).collect()
}

impl MachineCode {
    /// What came of a source: what the assembler says of it, and the disassembly. `units` and `shared_bytes` are those of its launch.
    pub fn of(arch: &Arch, resources: Resources, text: &str, units: u32, shared_bytes: u32) -> MachineCode {
        let shared_bytes = shared_bytes + resources.shared_bytes;
        MachineCode {
            arch: arch.name,
            resources,
            shared_bytes,
            occupancy: arch.occupancy(units, resources.registers, shared_bytes),
            instructions: Instructions::read(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_counted_by_what_they_do() {
        let text = "
	code for sm_90a
		Function : f
	.headerflags	@\"EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe40000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R7 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
        /*0070*/                   EXIT ;
";
        let expected = Instructions { total: 8, global: 3, wide: 2, tensor: 2, local: 1 };
        assert_eq!(Instructions::read(text), expected);
    }

    #[test]
    fn occupancy_is_what_the_scarcest_resource_allows() {
        let [ampere, hopper, _] = ARCHS;
        assert_eq!(hopper.occupancy(256, 32, 0), 1.0);
        assert_eq!(hopper.occupancy(256, 64, 0), 0.5, "4 blocks of 8 warps of 2048 registers");
        assert_eq!(hopper.occupancy(256, 255, 0), 0.125);
        assert_eq!(hopper.occupancy(128, 32, 100 << 10), 2.0 * 4.0 / 64.0, "two blocks of 101 KiB");
        assert_eq!(ampere.occupancy(128, 32, 100 << 10), 4.0 / 64.0);
        assert_eq!(ampere.occupancy(128, 32, 164 << 10), 0.0, "no room for the part that is reserved");
        assert_eq!(hopper.occupancy(32, 16, 0), 0.5, "32 blocks at most");
    }
}
