//! Kernels side by side in one grid.

use latentc_codegen::check::{Trial, check_together};
use latentc_codegen::cube::{Tuning, cuda_together_source, side_by_side, together_name};
use latentc_codegen::device::{Data, Device, Launch, keys};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::DType;
use proptest::prelude::*;

use crate::bench::{cuda_text, device, emulated, gpu, kernel, map};

/// A product of few rows with a norm before it, a sum over rows that whole cubes fold, single elements, rows into a cache, and sums by index.
fn kinds() -> Vec<Kernel> {
    vec![
        kernel(
            KernelKind::Contract,
            "product",
            "axes a0=n0, a1=67, a2=n1\nparam p0: bf16[a1, a2]\nparam p1: f32[a0, a2]\n\
             sum: f32[a0] = reduce_sum p1 over a2\nh: f32[a0, a2] = mul p1, sum\n\
             y: f32[a0, a1] = contract p0, h over a2\nreturn y",
        ),
        map(
            "rows",
            "axes a0=n0, a1=301\nparam p0: f32[a0, a1]\ns: f32[a0] = reduce_sum p0 over a1\n\
             y: f32[a0, a1] = mul p0, s\nreturn y",
        ),
        map("elements", "axes a0=n0, a1=n1\nparam p0: f32[a0, a1]\ny: f32[a0, a1] = silu p0\nreturn y"),
        map(
            "append",
            "axes t=n0, s=n1 like t, d=3\nparam p0: f32[s, d]\nparam p1: f32[t, d]\nparam p2: i32[t]\n\
             y: f32[s, d] = append p0, p1, p2 from t to s\nreturn y",
        ),
        kernel(
            KernelKind::Scatter,
            "scatter",
            "axes a0=n0, a1=5, a2=7\nparam p0: f32[a0, a2]\nparam p1: i32[a0]\n\
             y: f32[a1, a2] = scatter_add p0, p1 along a1\nreturn y",
        ),
    ]
}

fn pass<D: Device>(device: &mut D, trials: &[Trial], seed: u64) {
    let outcomes = check_together(device, trials, seed).unwrap_or_else(|e| panic!("{}: {e}", device.name()));
    for (trial, outcome) in trials.iter().zip(outcomes) {
        assert!(outcome.passes(), "{} beside others on {}: {outcome:?}", trial.kernel.name, device.name());
    }
}

/// All of them on each device there is, in this order with these sizes; an append has room.
fn agree(kernels: &[Kernel], sizes: &[usize], seed: u64) {
    let trial = |(n, kernel): (usize, &Kernel)| {
        let mut own: Vec<_> =
            (0..kernel.size_symbols().len()).map(|m| sizes[(n + m) % sizes.len()]).collect();
        if kernel.cache().is_some() {
            own[1] = own[0] + 2;
        }
        Trial { kernel: kernel.clone(), sizes: own }
    };
    let trials: Vec<_> = kernels.iter().enumerate().map(trial).collect();
    if let Some(mut device) = device() {
        pass(&mut device, &trials, seed);
    }
    if let Some(mut gpu) = gpu() {
        pass(&mut gpu, &trials, seed);
    }
    emulated(|emulator| pass(emulator, &trials, seed));
}

#[test]
fn each_computes_what_it_computes_alone() {
    agree(&kinds(), &[1], 1);
    // More than a cube of elements, and no rows at all.
    agree(&kinds(), &[37, 20, 9], 2);
    agree(&kinds(), &[0, 3], 3);
}

/// What was found out about launches at some sizes is not used for other sizes, other buffers or other neighbours.
#[test]
fn what_is_remembered_of_launches_is_right_for_others() {
    let Some(mut device) = device() else { return };
    let kernels = [
        map("twice", "axes a0=n0\nparam p0: f32[a0]\ny: f32[a0] = add p0, p0\nreturn y"),
        map("open", "axes a0=n0, a1=n1\nparam p0: f32[a0, a1]\ny: f32[a0, a1] = neg p0\nreturn y"),
    ];
    let keys = keys(kernels.len());
    let mut run = |chosen: &[(usize, &[usize])], start: f32| {
        let len = |sizes: &[usize]| sizes.iter().product::<usize>();
        let given: Vec<Vec<f32>> =
            chosen.iter().map(|(_, sizes)| (0..len(sizes)).map(|n| n as f32 + start).collect()).collect();
        let mut upload = |x: &Vec<f32>| device.upload(DType::F32, Data::F32(x.clone())).unwrap();
        let inputs: Vec<_> = given.iter().map(&mut upload).collect();
        let mut outputs: Vec<_> = given.iter().map(&mut upload).collect();
        let inputs: Vec<_> = inputs.iter().map(|b| [Some(b)]).collect();
        let launches = chosen.iter().zip(&inputs).zip(&mut outputs);
        let mut launches = launches.map(|((&(n, sizes), inputs), output)| Launch {
            kernel: &kernels[n],
            inputs,
            output,
            sizes,
            key: Some(keys + n as u64),
            still: None,
        });
        device.launch_together(&mut launches).unwrap();
        for ((&(n, _), given), output) in chosen.iter().zip(&given).zip(&outputs) {
            let factor = [2.0, -1.0][n];
            let want: Vec<_> = given.iter().map(|x| factor * x).collect();
            assert_eq!(device.read(output, want.len()).unwrap(), Data::F32(want), "{chosen:?}");
        }
    };
    for round in 0..3 {
        let start = 100.0 * round as f32;
        run(&[(0, &[5]), (1, &[3, 4])], start);
        // The same kernels with other sizes, in another order, and alone; one of them has nothing to do.
        run(&[(0, &[300]), (1, &[4, 3])], start);
        run(&[(1, &[3, 4]), (0, &[5])], start);
        run(&[(0, &[5])], start);
        run(&[(0, &[0]), (1, &[3, 4])], start);
        // More sizes than are remembered.
        (1..9).for_each(|n| run(&[(0, &[n]), (1, &[n, 2])], start));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn in_any_order(order in Just((0..5).collect::<Vec<usize>>()).prop_shuffle(), n in 2..=5usize,
                    sizes in prop::collection::vec(1..40usize, 3), seed: u64) {
        let kinds = kinds();
        let some: Vec<_> = order[..n].iter().map(|&k| kinds[k].clone()).collect();
        agree(&some, &sizes, seed);
    }
}

#[test]
fn the_text_has_the_cubes_of_each_behind_one_another() {
    let group = side_by_side(&kinds()[..3], &Tuning::default()).unwrap();
    let text = cuda_together_source(&group).unwrap().unwrap().text;
    assert_eq!(together_name(&group), "product_few01_and_2");
    for name in ["product_few01", "rows", "elements"] {
        assert!(text.contains(&format!("// {name}: ")), "{text}");
    }
    if let Some(resources) = cuda_text(&together_name(&group), &text) {
        assert_eq!(resources.spill_bytes, 0, "{resources:?}");
    }
}
