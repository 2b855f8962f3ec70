//! Kernels to measure a device with, as IR.

use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{DType, parse};

fn kernel(name: &str, body: &str) -> Kernel {
    let text = format!("module {name} entry @{name}\n\nfunc @{name} {{\n{body}}}\n");
    let module = parse("a kernel of bench", &text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
    let body = module.functions.into_iter().next().expect("a module has its entry");
    Kernel { name: name.to_owned(), kind: KernelKind::of(&body), body }
}

/// Writes a block `n0` times.
pub(super) fn fill(dtype: DType, block: usize) -> Kernel {
    kernel(
        &format!("bench_fill_{dtype}"),
        &format!(
            "  axes a0=n0, a1={block}\n  param p0: {dtype}[a1={block}]\n\n  \
             x1: {dtype}[a0, a1={block}] = broadcast p0 over a0\n  return x1\n"
        ),
    )
}

/// Copies `n0` elements.
pub(super) fn copy(dtype: DType) -> Kernel {
    kernel(
        &format!("bench_copy_{dtype}"),
        &format!(
            "  axes a0=n0, a1=n0\n  param p0: {dtype}[a0]\n\n  x1: {dtype}[a1] = rename p0 from a0 to a1\n  return x1\n"
        ),
    )
}

/// Copies `n0` rows of so many elements.
pub(super) fn copy_rows(dtype: DType, columns: usize) -> Kernel {
    kernel(
        &format!("bench_copy_rows_{dtype}"),
        &format!(
            "  axes a0=n0, a1={columns}\n  param p0: {dtype}[a0, a1={columns}]\n\n  \
             x1: {dtype}[a0, a1={columns}] = cast p0\n  return x1\n"
        ),
    )
}

/// Multiplies `n0` rows with a matrix of `n` rows of `k`.
pub(super) fn product(name: &str, dtype: DType, n: u64, k: u64) -> Kernel {
    kernel(
        name,
        &format!(
            "  axes a0=n0, a1={n}, a2={k}\n  param p0: {dtype}[a0, a2={k}]\n  param p1: {dtype}[a1={n}, a2={k}]\n\n  \
             x2: {dtype}[a0, a1={n}] = contract p0, p1 over a2\n  return x2\n"
        ),
    )
}

#[cfg(test)]
mod tests {
    use latentc_codegen::cube::chosen;

    use super::*;

    #[test]
    fn they_verify() {
        for dtype in [DType::F32, DType::Bf16, DType::F16, DType::I32] {
            for kernel in [fill(dtype, 7), copy(dtype)] {
                latentc_ir::verify(&kernel.module()).unwrap();
            }
        }
        let product = product("p", DType::Bf16, 3, 5);
        latentc_ir::verify(&product.module()).unwrap();
        assert_eq!(product.kind, KernelKind::Contract);
    }

    #[test]
    fn ceilings_are_of_the_best_ways() {
        let way = |n, k, rows| chosen(&product("p", DType::Bf16, n, k), &[rows]).kind;
        assert!(matches!(way(8192, 8192, 8192), KernelKind::Matrix { .. }));
        assert!(matches!(way(131_072, 4096, 1), KernelKind::Few { rows: 1, .. }));
    }
}
