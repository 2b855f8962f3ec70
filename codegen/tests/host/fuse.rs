//! What stands around products in their kernels, and what does not: texts before, launches after.

use latentc_codegen::schedule::{schedule, schedule_explained};
use latentc_passes::{Context, Graph};

use super::check;

/// The launch list of a function with this body, without its first and last line.
fn launches(body: &str) -> String {
    let text = format!("module m entry @f\n\nfunc @f {{\n{body}\n}}\n");
    let module = latentc_ir::check("m.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()));
    let program = schedule(&module, &Context::new(Graph::Decode)).unwrap().to_string();
    program.lines().filter(|l| l.contains("launch")).map(|l| format!("{}\n", l.trim())).collect()
}

/// A projection of one token to heads, and what follows it.
fn projection(weight: &str, behind: &str) -> String {
    format!(
        "axes b, t, s like t, i=4, r=64, d=512, p=32\nparam x: bf16[b, t, d]\nparam pos: i32[b, t]\nparam freq: f32[p]\n\
         weight W: bf16[{weight}] = \"w\"[{weight}]\ncache past: bf16[s, b, i, r]\n\
         q: f32[b, t, i, r] = contract W, x over d\n{behind}"
    )
}

#[test]
fn rows_times_themselves_are_no_grouped_product() {
    let text = "module m entry @f\n\nfunc @f {\n  axes b, t, v=8, d=4\n  param tok: i32[b, t]\n  weight E: f32[v=8, d=4] = \"e\"[v, d]\n  \
                x: f32[b, t, d=4] = gather E, tok along v\n  y: f32[b, t] = contract x, x over d\n  return y\n}\n";
    let module = latentc_ir::check("m.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let program = schedule(&module, &Context::new(Graph::Train)).expect("every op has a kernel");
    for kernel in &program.kernels {
        check(kernel, 1).unwrap_or_else(|e| panic!("{e}\n{program}"));
    }
}

#[test]
fn a_rotation_is_made_of_sums_and_goes_to_the_cache() {
    // Pairs of neighbours, and halves that are read one by one.
    for (weight, pairs) in [("i, r, d", "interleaved"), ("i, r, d", "halves"), ("d, i, r", "interleaved")] {
        let rope = format!("k: bf16[b, t, i, r] = rope q, pos, freq over r pairs {pairs}");
        assert_eq!(
            launches(&projection(weight, &format!("{rope}\nreturn k"))),
            "k: bf16[b, t, 4, 64] = launch f_k(W, x, pos, freq) over b, t\n"
        );
        let append = "k.s: bf16[s, b, i, r] = append past, k, pos from t to s\ny: bf16[s, b, i, r] = neg k.s\nreturn y";
        assert_eq!(
            launches(&projection(weight, &format!("{rope}\n{append}"))),
            "past: bf16[s, b, 4, 64] = launch f_k_s(past, W, x, pos, freq) over t, s, b\n\
             y: bf16[s, b, 4, 64] = launch f_y(past) over s, b\n"
        );
    }
    let append = "v: bf16[b, t, i, r] = cast q\nv.s: bf16[s, b, i, r] = append past, v, pos from t to s\n\
                  y: bf16[s, b, i, r] = neg v.s\nreturn y";
    assert!(
        launches(&projection("i, r, d", append))
            .starts_with("past: bf16[s, b, 4, 64] = launch f_v_s(past, W, x, pos)")
    );
}

#[test]
fn what_would_need_the_sums_of_others_is_not_made_of_them() {
    let product = "q: f32[b, t, 4, 64] = launch f_q(W, x) over b, t\n";
    // Halves that lie side by side are read in packs of neighbours; partners along an axis that is not the last are far apart.
    let rope = "k: bf16[b, t, i, r] = rope q, pos, freq over r pairs halves\nreturn k";
    assert!(launches(&projection("d, i, r", rope)).starts_with(product));
    let rope = "k: bf16[b, t, i, r] = rope q, pos, freq over r pairs interleaved\nreturn k";
    assert!(launches(&projection("r, i, d", rope)).starts_with(product));
    // A row of a norm is shared out over cubes.
    let norm = "most: f32[b, t, i] = reduce_max q over r\nn: bf16[b, t, i, r] = div q, most\n\
                n.s: bf16[s, b, i, r] = append past, n, pos from t to s\ny: bf16[s, b, i, r] = neg n.s\nreturn y";
    assert!(launches(&projection("i, r, d", norm)).starts_with(product));
    // What is wanted elsewhere too has memory of its own.
    let both = "k: bf16[b, t, i, r] = rope q, pos, freq over r pairs interleaved\n\
                k.s: bf16[s, b, i, r] = append past, k, pos from t to s\ny: bf16[s, b, i, r] = neg k.s\nreturn y, k";
    assert!(
        launches(&projection("i, r, d", both))
            .starts_with("k: bf16[b, t, 4, 64] = launch f_k(W, x, pos, freq)")
    );
}

/// So many products of one input, added up.
fn products(count: usize) -> String {
    let mut text = "axes b, t, d=512, f=512\nparam x: bf16[b, t, d]\n".to_owned();
    for n in 0..count {
        text += &format!("weight W{n}: bf16[f, d] = \"w{n}\"[f, d]\n");
    }
    for n in 0..count {
        text += &format!("p{n}: f32[b, t, f] = contract W{n}, x over d\n");
    }
    text += "s0: f32[b, t, f] = silu p0\n";
    for n in 1..count {
        text += &format!("s{n}: f32[b, t, f] = mul s{}, p{n}\n", n - 1);
    }
    text + &format!("return s{}", count - 1)
}

#[test]
fn products_meet_as_far_as_there_are_registers() {
    assert_eq!(
        launches(&products(4)),
        "s3: f32[b, t, 512] = launch f_s3(W0, x, W1, W2, W3) over b, t\n",
        "4 products keep 64 sums, and 20 elements of 5 operands"
    );
    let five = launches(&products(5));
    assert_eq!(five.lines().count(), 2, "{five}");
    let text = format!("module m entry @f\n\nfunc @f {{\n{}\n}}\n", products(5));
    let module = latentc_ir::check("m.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()));
    let (_, remarks) = schedule_explained(&module, &Context::new(Graph::Decode)).unwrap();
    let said: Vec<_> =
        remarks.iter().filter(|r| r.message.contains("registers of")).map(|r| &r.message).collect();
    assert_eq!(said.len(), 1, "{remarks:?}");
    assert!(
        said[0].starts_with(
            "is stored, since the kernel of `s4` would take 8 buffers of 10 and 106 registers of 96"
        ),
        "{}",
        said[0]
    );
}

/// A product to which so many tensors are added.
fn residuals(count: usize) -> String {
    let mut text =
        "axes b, t, d=512, f=512\nparam x: bf16[b, t, d]\nweight W: bf16[f, d] = \"w\"[f, d]\n".to_owned();
    let params = (0..count).map(|n| format!("param r{n}: f32[b, t, f]\n"));
    text = text.replace("weight", &(params.collect::<String>() + "weight"));
    text += "s: f32[b, t, f] = contract W, x over d\n";
    for n in 0..count {
        let before = if n == 0 { "s".to_owned() } else { format!("s{}", n - 1) };
        text += &format!("s{n}: f32[b, t, f] = add {before}, r{n}\n");
    }
    text + &format!("return s{}", count - 1)
}

#[test]
fn a_kernel_reads_as_many_buffers_as_every_target_gives() {
    assert_eq!(
        launches(&residuals(6)),
        "s5: f32[b, t, 512] = launch f_s5(W, x, r0, r1, r2, r3, r4, r5) over b, t\n",
        "with the result and the sizes that is 10"
    );
    assert_eq!(
        launches(&residuals(8)),
        "s0: f32[b, t, 512] = launch f_s0(W, x, r0) over b, t\n\
         s7: f32[b, t, 512] = launch f_s7(s0, r1, r2, r3, r4, r5, r6, r7) over b, t\n"
    );
}
