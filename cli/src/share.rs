//! One set of kernels for several graphs.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use latentc_codegen::program::{Kernel, Program};

/// The distinct kernels of all programs, in the order in which they are first met. The programs are renamed to match: what
/// computes the same has one name, what does not has two. Names differ in more than case, since they become files.
pub(crate) fn share<'a>(programs: impl IntoIterator<Item = &'a mut Program>) -> Vec<Kernel> {
    let mut shared: Vec<Kernel> = Vec::new();
    let mut known: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for program in programs {
        for kernel in &mut program.kernels {
            let key = (kernel.kind.to_string(), kernel.nameless().to_string());
            let at = *known.entry(key).or_insert_with(|| {
                let mut new = kernel.clone();
                new.name = free(&kernel.name, &mut taken);
                new.body.name.clone_from(&new.name);
                shared.push(new);
                shared.len() - 1
            });
            kernel.clone_from(&shared[at]);
        }
    }
    shared
}

/// Refuses a name that none of the kernels has.
pub(crate) fn all_there(of: &str, wanted: &[String], known: &[&str]) -> anyhow::Result<()> {
    match wanted.iter().find(|name| !known.contains(&name.as_str())) {
        Some(name) => bail!("{of} has no kernel `{name}` here; it has {}", known.join(", ")),
        None => Ok(()),
    }
}

/// The name, numbered if it is taken.
fn free(wanted: &str, taken: &mut BTreeSet<String>) -> String {
    let mut name = wanted.to_owned();
    let mut number = 2;
    while !taken.insert(name.to_lowercase()) {
        name = format!("{wanted}_v{number}");
        number += 1;
    }
    name
}

#[cfg(test)]
mod tests {
    use latentc_codegen::program::KernelKind;
    use latentc_ir::{DType, Function, Op, Real, Type};

    use super::*;

    fn program(kernels: &[(&str, f64)]) -> Program {
        let kernel = |&(name, x): &(&str, f64)| {
            let mut body = Function::new(name);
            let ty = Type::new(DType::F32, Vec::new());
            body.results = body.push(Op::Const(vec![Real(x)]), &[], &[("x", ty)]);
            Kernel { name: name.to_owned(), kind: KernelKind::Map, body }
        };
        let kernels = kernels.iter().map(kernel).collect();
        Program { name: String::new(), kernels, routines: Vec::new(), entry: String::new(), pool: None }
    }

    #[test]
    fn what_computes_the_same_has_one_name_and_what_does_not_has_two() {
        let mut programs = [program(&[("f_x", 1.0), ("f_X", 2.0)]), program(&[("f_x", 3.0), ("g_y", 1.0)])];
        let shared = share(&mut programs);
        let names: Vec<_> = shared.iter().map(|k| (k.name.as_str(), k.body.name.as_str())).collect();
        assert_eq!(names, [("f_x", "f_x"), ("f_X_v2", "f_X_v2"), ("f_x_v3", "f_x_v3")]);
        let of = |p: &Program| p.kernels.iter().map(|k| k.name.clone()).collect::<Vec<_>>();
        assert_eq!(of(&programs[0]), ["f_x", "f_X_v2"]);
        assert_eq!(of(&programs[1]), ["f_x_v3", "f_x"]);
    }
}
