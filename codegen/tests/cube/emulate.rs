//! That the emulator of CUDA finds what is wrong: each test breaks a text that is right.

use latentc_codegen::check::{launch, meaning};
use latentc_codegen::cube::cuda_source;
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::{Kernel, KernelKind};

use crate::bench::{emulated, inputs, kernel, map, tolerance};

/// What is wrong with the kernel's text once it is edited: the emulator's complaint, or how far the result is from what it should be.
fn broken(kernel: &Kernel, sizes: &[usize], edit: impl Fn(&str) -> String) -> Option<String> {
    let text = cuda_source(kernel).unwrap();
    let edited = edit(&text);
    assert_ne!(edited, text, "nothing to break");
    verdict(kernel, sizes, edited)
}

fn verdict(kernel: &Kernel, sizes: &[usize], text: String) -> Option<String> {
    let mut said = None;
    emulated(|_| {
        let mut emulator = Emulator::open(3).unwrap();
        emulator.replace(kernel, text).unwrap();
        let args = inputs(kernel, sizes, &[]);
        let want = meaning(kernel, &args, sizes).unwrap();
        let t = tolerance(kernel);
        said = Some(match launch(&mut emulator, kernel, &args, sizes) {
            Err(e) => e.to_string(),
            Ok(got) => match got.close_to(&want, t, t) {
                Err(e) => e.to_string(),
                Ok(()) => "nothing".to_owned(),
            },
        });
    });
    said
}

fn product() -> Kernel {
    let body = "axes a0=n0, a1=n1, a2=n2\nparam p0: f32[a0, a2]\nparam p1: f32[a1, a2]\n\
                y: f32[a0, a1] = contract p0, p1 over a2\nreturn y";
    kernel(KernelKind::Contract, "product", body)
}

fn twice() -> Kernel {
    map("twice", "axes a0=n0\nparam p0: bf16[a0]\ny: f32[a0] = add p0, p0\nreturn y")
}

/// All units of a cube fold the row, and all need what it comes to.
fn sums() -> Kernel {
    let body = "axes a0=n0, a1=n1\nparam p0: f32[a0, a1]\nx: f32[a0] = reduce_sum p0 over a1\n\
                y: f32[a0, a1] = mul p0, x\nreturn y";
    map("sums", body)
}

/// The text without its `n`-th barrier.
fn without_barrier(text: &str, n: usize) -> String {
    let at = text.match_indices("__syncthreads();").nth(n).expect("so many barriers").0;
    format!("{}{}", &text[..at], &text[at + "__syncthreads();".len()..])
}

#[test]
fn a_missing_barrier_shows() {
    // Before the tile is read, and before it is written again.
    for n in [0, 1] {
        let Some(said) = broken(&product(), &[70, 65, 40], |t| without_barrier(t, n)) else { return };
        assert!(said.contains("elements differ"), "barrier {n}: {said}");
    }
    let barriers = cuda_source(&sums()).unwrap().matches("__syncthreads();").count();
    for n in 0..barriers {
        let Some(said) = broken(&sums(), &[5, 300], |t| without_barrier(t, n)) else { return };
        // The last one keeps a row of the next fold from this one's; there is none here.
        assert!(n + 1 == barriers || said.contains("elements differ"), "barrier {n}: {said}");
    }
}

#[test]
fn an_access_outside_of_a_buffer_shows() {
    let Some(said) = broken(&twice(), &[300], |t| t.replace("l_0 < ", "l_0 <= ")) else { return };
    let want =
        "kernel twice: thread 44 of block (1, 0, 0): reads 2 bytes at buffer_0[300], which has 300, in line ";
    assert!(said.starts_with(want), "{said}");
    // Of the block's memory: rows of the tiles one element too far apart.
    let edit = |t: &str| t.replace("* uint32(65);", "* uint32(66);");
    let Some(said) = broken(&product(), &[70, 65, 40], edit) else { return };
    assert!(
        said.contains("writes 4 bytes at dynamic_shared_mem[") && said.contains("which has 8320"),
        "{said}"
    );
}

#[test]
fn memory_of_the_block_that_is_not_written_shows() {
    let Some(said) = broken(&product(), &[3, 3, 3], |t| {
        let at = t.find("shared_memory_12[").expect("a store to the first tile");
        let end = at + t[at..].find(';').expect("a statement");
        format!("{}{}", &t[..at], &t[end + 1..])
    }) else {
        return;
    };
    assert!(said.contains("elements differ"), "{said}");
}

#[test]
fn wrong_arithmetic_shows() {
    // Sums in 16 bits.
    let edit = |t: &str| format!("#include <cuda_fp16.h>\n{}", t.replace("float l_mut_", "__half l_mut_"));
    let Some(said) = broken(&product(), &[5, 5, 60], edit) else { return };
    assert!(said.contains("elements differ"), "{said}");
    // One depth read twice, another not at all.
    let edit = |t: &str| t.replacen("+ uint32(130)", "+ uint32(65)", 1);
    let Some(said) = broken(&product(), &[5, 5, 60], edit) else { return };
    assert!(said.contains("elements differ"), "{said}");
    // What is not written is not what was there before.
    let Some(said) = broken(&twice(), &[300], |t| t.replace("l_0 < ", "l_0 + 1 < ")) else { return };
    assert!(said.contains("elements differ") || said.contains("1 of 300"), "{said}");
}

#[test]
fn threads_that_do_not_meet_show() {
    let edit = |t: &str| t.replacen("__syncthreads();", "if (threadIdx.x != 7) __syncthreads();", 1);
    let Some(said) = broken(&sums(), &[2, 300], edit) else { return };
    assert!(said.contains("__syncthreads in line "), "{said}");
    let edit = |t: &str| t.replacen("__syncthreads();", "if (threadIdx.x == 7) return; __syncthreads();", 1);
    let Some(said) = broken(&sums(), &[2, 300], edit) else { return };
    assert!(said.contains("but thread 7 has returned"), "{said}");
    let edit = |t: &str| t.replacen("__syncthreads();", "if (threadIdx.x < 7) __syncwarp();", 1);
    let Some(said) = broken(&sums(), &[2, 300], edit) else { return };
    assert!(said.contains("__syncwarp in line "), "{said}");
}

/// The instruction that waits for the grids ahead.
const WAIT: &str = "asm volatile(\"griddepcontrol.wait;\" ::: \"memory\");";

/// The text with its wait at the end, where nothing is left to be waited for.
fn waits_last(text: &str) -> String {
    let text = text.replacen(WAIT, "", 1);
    let end = text.trim_end().rfind('}').expect("a kernel ends");
    format!("{}{WAIT}\n}}\n", &text[..end])
}

#[test]
fn what_the_grids_ahead_write_is_touched_after_the_wait_alone() {
    let early = ", before all threads have waited for the grids ahead, in line ";
    let Some(said) = broken(&twice(), &[300], waits_last) else { return };
    assert!(said.contains("reads 2 bytes at buffer_0[") && said.contains(early), "{said}");
    // What no thread waits for is launched when the grids ahead are done.
    assert_eq!(broken(&twice(), &[300], |t| t.replacen(WAIT, "", 1)).unwrap(), "nothing");
    let some = |t: &str| t.replacen(WAIT, &format!("if (threadIdx.x != 7) {{ {WAIT} }}"), 1);
    let said = broken(&twice(), &[300], some).unwrap();
    assert!(said.contains("thread 7 of block (") && said.contains(early), "{said}");
    // Where threads meet, all of them have waited, or none.
    let said = broken(&sums(), &[2, 300], some).unwrap();
    assert!(said.contains("thread 7 of block (") && said.contains(early), "{said}");
}

#[test]
fn a_product_with_few_rows_reads_its_wide_operand_before_the_wait() {
    // Registers hold all that a unit reads of the first; most of the second is on its way past them.
    for (depth, read) in
        [(2048, "asm volatile(\"ld.global."), (12288, "__cp_async_shared_global<16>(buffer_0 + ")]
    {
        let body = format!(
            "axes a0=n0, a1=40, a2={depth}\nparam p0: bf16[a1, a2]\nparam p1: f32[a0, a2]\n\
             y: f32[a0, a1] = contract p0, p1 over a2\nreturn y"
        );
        let k = kernel(KernelKind::Few { wide: 0, rows: 1 }, "early", &body);
        let text = cuda_source(&k).unwrap();
        let (before, _) = text.split_once(WAIT).expect("it waits");
        assert!(before.contains(read), "{text}");
        let Some(said) = verdict(&k, &[1], text.clone()) else { return };
        assert_eq!(said, "nothing");
        let said = verdict(&k, &[1], waits_last(&text)).unwrap();
        assert!(
            said.contains("reads 16 bytes at buffer_1[") && said.contains("waited for the grids ahead"),
            "{said}"
        );
        // What is read so lies in the buffer.
        let all = 40 * depth;
        let beyond = |t: &str| {
            let t = t.replacen("\"l\"(_tmp_0 + ", &format!("\"l\"(_tmp_0 + {all} / 8 + "), 1);
            t.replacen("(buffer_0 + ", &format!("(buffer_0 + {all} + "), 1)
        };
        let said = broken(&k, &[1], beyond).unwrap();
        assert!(said.contains("bytes at buffer_0[") && said.contains(&format!("which has {all}")), "{said}");
        if depth > 2048 {
            // Who does not wait for copies multiplies what was there before.
            let hurried = |t: &str| t.replace("asm volatile(\"cp.async.wait_group", "// ");
            let said = broken(&k, &[1], hurried).unwrap();
            assert!(said.contains("elements differ"), "{said}");
        }
    }
}

/// A text of our own in place of a kernel's.
fn written(kernel: &Kernel, sizes: &[usize], body: &str) -> Option<String> {
    let head = "#include <cuda_runtime.h>\n#include <cuda_bf16.h>\n#include <mma.h>\nusing namespace nvcuda::wmma;\n\
                struct __align__(16) wide { float x[4]; };\n";
    verdict(kernel, sizes, format!("{head}extern \"C\" __global__ void {} ({body}\n}}\n", kernel.name))
}

#[test]
fn lanes_of_a_warp_exchange() {
    let k =
        map("sums", "axes a0=3, a1=32\nparam p0: f32[a0, a1]\ny: f32[a0] = reduce_sum p0 over a1\nreturn y");
    let text = |exchange: &str| {
        format!(
            "const float* x, float* y) {{\nif (threadIdx.x >= 96) return;\nfloat sum = x[threadIdx.x];\n\
             for (int by = 1; by < 32; by *= 2) {exchange}\n\
             if (__any_sync(-1, threadIdx.x % 32 == 5) && threadIdx.x % 32 == 9) y[threadIdx.x / 32] = sum;"
        )
    };
    let Some(said) = written(&k, &[], &text("sum += __shfl_xor_sync(-1, sum, by);")) else { return };
    assert_eq!(said, "nothing");
    let said = written(&k, &[], &text("if (threadIdx.x % 2) sum += __shfl_xor_sync(-1, sum, by);")).unwrap();
    assert!(said.contains("_sync in line ") && said.contains(" of the same warp is at "), "{said}");
    let said = written(&k, &[], &text("sum += __shfl_down_sync(-1, sum, by);")).unwrap();
    assert!(said.contains("elements differ"), "{said}");
}

#[test]
fn accesses_of_several_elements_are_aligned() {
    let k = map("copy", "axes a0=9\nparam p0: f32[a0]\ny: f32[a0] = neg p0\nreturn y");
    let text = "const float* x, float* y) {\nif (threadIdx.x == 0) {\n\
                wide all = reinterpret_cast<const wide*>(x + 1)[0];\ny[0] = all.x[3]; }";
    let Some(said) = written(&k, &[], text) else { return };
    let thread = said.starts_with("kernel copy: thread 0 of block (0, 0, 0): ");
    assert!(
        thread && said.contains("misaligned address") && said.ends_with(", in line 8 of copy.cu"),
        "{said}"
    );
}

#[test]
fn tiles_are_multiplied() {
    let k = kernel(
        KernelKind::Contract,
        "tile",
        "axes a0=16, a1=16, a2=32\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\n\
         y: f32[a0, a1] = contract p0, p1 over a2\nreturn y",
    );
    let text = |threads: &str, sum: &str, offset: &str| {
        format!(
            "const __nv_bfloat16* a, const __nv_bfloat16* b, float* y) {{\nif (threadIdx.x >= {threads}) return;\n\
             fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> left;\n\
             fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> right;\n\
             fragment<accumulator, 16, 16, 16, {sum}> sum;\nfill_fragment(sum, 0.0);\n\
             for (int k = 0; k < 32; k += 16) {{\nload_matrix_sync(left, a + k{offset}, 32);\n\
             load_matrix_sync(right, b + k, 32);\nmma_sync(sum, left, right, sum);\n}}\n\
             fragment<accumulator, 16, 16, 16, float> result;\n\
             for (int t = 0; t < sum.num_elements; t++) {{ result.x[t] = float(sum.x[t]); }}\n\
             store_matrix_sync(y, result, 16, mem_row_major);"
        )
    };
    let Some(said) = written(&k, &[], &text("32", "float", "")) else { return };
    assert_eq!(said, "nothing");
    let wrong = |threads, sum, offset| written(&k, &[], &text(threads, sum, offset)).unwrap();
    assert!(wrong("32", "__half", "").contains("elements differ"));
    assert!(wrong("31", "float", "").contains("wmma::load_matrix_sync by a warp without lane 31"));
    assert!(wrong("32", "float", " + 1").contains("no multiple of 32 bytes"));
    assert!(wrong("32", "float", " + threadIdx.x").contains("other addresses in lane"));
    let outside = wrong("32", "float", " + 32");
    assert!(outside.contains("reads 2 bytes at buffer_0[512], which has 512"), "{outside}");
}
