//! Launches on a device of CubeCL: checked, shared out to grids and run.

use std::sync::Arc;

use latentc_ir::{DType, Type, ValueId};

use super::device::{CubeBuffer, CubeDevice, CubeRuntime, Launches};
use super::kernel::CubeIr;
use super::overlap::early_of;
use super::prepared::{Arranged, Does, Halves, OneGrid, Prepared, Several, Staged};
use super::queue::When;
use super::refuse;
use super::shape::{Grid, LaunchShape, in_one_grid};
use super::split::{Role, Split};
use super::stages::Operand;
use super::ways::joins;
use crate::device::{Device, DeviceError, Launch};
use crate::program::Kernel;

/// A checked launch that does something.
pub(super) struct Ready<'a> {
    pub(super) kernel: &'a Kernel,
    /// In the order of the kernel's arguments, the output last.
    pub(super) buffers: Vec<&'a CubeBuffer>,
    /// Whether it was not launched in that way before.
    pub(super) first: bool,
    /// As [`Launch`] has it.
    pub(super) still: Option<u64>,
}

impl<R: CubeRuntime> CubeDevice<R> {
    /// The grid of a launch, all zeros if there is nothing to do.
    fn grid(
        &self,
        kernel: &Kernel,
        shape: &LaunchShape,
        number: impl Fn(&str) -> usize,
    ) -> Result<Grid, DeviceError> {
        let grid = shape.grid(number).map_err(|why| refuse(kernel, why))?;
        let hardware = &self.client.properties().hardware;
        let grid = shape.on_device(grid, hardware.num_streaming_multiprocessors);
        let most = self.client.properties().hardware.max_cube_count;
        if grid.0 > most.0 || grid.1 > most.1 {
            let (x, y, _) = grid;
            let cubes = format!("{x} x {y} cubes, where the device takes {} x {}", most.0, most.1);
            return Err(refuse(kernel, cubes));
        }
        Ok(grid)
    }

    /// Checks a launch, and compiles what was not launched before. `None` if there is nothing to do.
    pub(super) fn ready<'a>(
        &mut self,
        launch: Launch<'a, CubeBuffer>,
    ) -> Result<Option<(Ready<'a>, Arc<Prepared>)>, DeviceError> {
        let Launch { kernel, inputs, output, sizes, key, still } = launch;
        let known = key.and_then(|key| self.memory.kernels.find(key, sizes));
        let symbols = known.as_ref().map_or_else(|| kernel.size_symbols().len(), |known| known.sizes.len());
        let params = kernel.body.params.len();
        if inputs.len() != params || sizes.len() != symbols {
            let given = format!("{} buffers and {} sizes", inputs.len(), sizes.len());
            return Err(refuse(kernel, format!("{given}, not {params} and {symbols}")));
        }
        let (prepared, first) = match known {
            Some(known) => (known, false),
            None => {
                let (prepared, first) = self.prepare(kernel, sizes)?;
                let prepared = Arc::new(prepared);
                if let Some(key) = key {
                    self.memory.kernels.keep(key, sizes, &prepared);
                }
                (prepared, first)
            }
        };
        if prepared.grid.0 == 0 {
            return Ok(None);
        }
        let mut buffers = Vec::with_capacity(inputs.len() + 1);
        for ((wanted, input), &param) in prepared.inputs.iter().zip(inputs).zip(&kernel.body.params) {
            match (wanted, input) {
                (Some(wanted), Some(buffer)) => {
                    fits(kernel, (param, *wanted), buffer)?;
                    buffers.push(*buffer);
                }
                (Some(_), None) => return Err(refuse(kernel, "an input is missing")),
                (None, None) => {}
                (None, Some(_)) => {
                    return Err(refuse(kernel, "a cache is given as the output, not as an input"));
                }
            }
        }
        fits(kernel, (kernel.body.results[0], prepared.output), output)?;
        buffers.push(output);
        Ok(Some((Ready { kernel, buffers, first, still }, prepared)))
    }

    /// What a kernel comes to at these sizes, and whether that is its first launch in that way.
    fn prepare(&mut self, kernel: &Kernel, sizes: &[usize]) -> Result<(Prepared, bool), DeviceError> {
        let extents = kernel.extents(sizes);
        let (taken, launches, first) = self.compiled(kernel, sizes)?;
        let (_, ir, shape) = &launches.stages[0];
        let grid = self.grid(kernel, shape, kernel.number(sizes))?;
        let body = &kernel.body;
        let needs = |value: ValueId| {
            let Type { dtype, axes } = body.ty(value);
            (*dtype, axes.iter().map(|a| extents[a.0 as usize]).fold(1usize, usize::saturating_mul))
        };
        let inputs: Vec<_> = body.params.iter().map(|&p| CubeIr::reads(body, p).then(|| needs(p))).collect();
        let output = needs(body.results[0]);
        let cubes = grid.0 as usize * grid.1 as usize;
        let plan = ir.plan().filter(|_| cubes > 0);
        let split = plan.and_then(|plan| {
            let cubes = (cubes, shape.shared_bytes);
            Some((plan, Split::of(plan, cubes, &extents, &self.machine, taken.parts)?))
        });
        let halves = split.map(|(plan, split)| {
            let grids = split.grids(shape, grid).map_err(|why| refuse(kernel, why))?;
            let sizes = [sizes, &[split.chunk]].concat();
            let half = |role: Role, grid: Grid| {
                let read = role.reads(body, plan);
                let numbers = body.params.iter().enumerate().filter(|(_, p)| read.contains(p));
                let numbers: Vec<_> = numbers.map(|(n, _)| n).collect();
                let mut lens: Vec<_> = numbers.iter().map(|&n| inputs[n].map_or(0, |(_, len)| len)).collect();
                lens.push(split.scratch);
                lens.extend((role == Role::Merge).then_some(output.1));
                (OneGrid::new(self.edits.apply(ir.of_role(role)), grid, &sizes, &lens), numbers)
            };
            let grids = [half(Role::Part, grids[0]), half(Role::Merge, grids[1])];
            Ok(Several::Halves(Box::new(Halves { scratch: split.scratch, grids })))
        });
        let several = match halves {
            None if launches.stages.len() > 1 => {
                let lens: Vec<_> = inputs.iter().flatten().map(|&(_, len)| len).collect();
                Some(Several::Staged(self.staged(kernel, &launches, sizes, (&lens, output.1))?))
            }
            halves => halves.transpose()?,
        };
        let early = launches.stages.iter().map(|(stage, ..)| early_of(&stage.kernel));
        let early = early.flatten().map(|v| body.params.iter().position(|p| *p == v)).collect();
        // What is several reads other buffers, too.
        let early: Option<Vec<_>> = early;
        let early = early.filter(|early| launches.stages.len() == 1 || early.is_empty());
        let (name, sizes) = (Arc::from(kernel.name.as_str()), sizes.to_vec());
        let kind = taken.kind;
        Ok((Prepared { name, sizes, kind, launches, grid, inputs, output, several, early }, first))
    }

    /// Shares launches out to grids: as many in one as fit.
    pub(super) fn arrange(
        &self,
        kernels: &[&Kernel],
        of: Vec<Arc<Prepared>>,
    ) -> Result<Arranged, DeviceError> {
        let hardware = &self.client.properties().hardware;
        // Half of the memory of a cube at most, so that two of them fit on a processor.
        let (bindings, shared) = (hardware.max_bindings as usize, hardware.max_shared_memory_size / 2);
        let shape = |n: usize| &of[n].launches.stages[0].2;
        let ir = |n: usize| &of[n].launches.stages[0].1;
        let own = |n: usize| joins(of[n].kind) && of[n].several.is_none() && ir(n).edit().is_none();
        let room = |grid: &[usize], next: usize| {
            let all = || grid.iter().copied().chain([next]);
            all().all(|n| own(n) && shape(n).units == shape(next).units)
                && all().map(|n| of[n].lens().count()).sum::<usize>() <= bindings
                && all()
                    .map(|n| shape(n).clone())
                    .reduce(LaunchShape::beside)
                    .is_some_and(|s| s.shared_bytes <= shared)
                && in_one_grid(all().map(|n| of[n].grid), shape(next).units).is_ok()
        };
        let mut grids: Vec<Vec<usize>> = Vec::new();
        for n in 0..of.len() {
            match grids.iter_mut().find(|grid| room(grid, n)) {
                Some(grid) => grid.push(n),
                None => grids.push(vec![n]),
            }
        }
        let does = |members: &[usize]| {
            let first = members[0];
            let one = &of[first];
            if members.len() == 1 {
                if one.several.is_some() {
                    return Ok(Does::More);
                }
                let lens: Vec<_> = one.lens().collect();
                return Ok(Does::Grid(OneGrid::new(ir(first).clone(), one.grid, &one.sizes, &lens)));
            }
            let grids = members.iter().map(|&n| of[n].grid);
            let (ends, grid) =
                in_one_grid(grids, shape(first).units).map_err(|why| refuse(kernels[first], why))?;
            let lens: Vec<_> = members.iter().flat_map(|&n| of[n].lens()).collect();
            let sizes: Vec<_> =
                members.iter().flat_map(|&n| of[n].sizes.iter().copied()).chain(ends).collect();
            let ir = self.edits.apply(CubeIr::together(members.iter().map(|&n| ir(n))));
            Ok(Does::Grid(OneGrid::new(ir, grid, &sizes, &lens)))
        };
        let grids = grids.into_iter().map(|members| {
            let does = does(&members)?;
            Ok((members, does))
        });
        let grids = grids.collect::<Result<_, DeviceError>>()?;
        Ok(Arranged::new(of, grids))
    }

    /// The stages of a kernel whose parameters and output have so many elements.
    fn staged(
        &self,
        kernel: &Kernel,
        launches: &Launches,
        sizes: &[usize],
        (params, output): (&[usize], usize),
    ) -> Result<Staged, DeviceError> {
        let number = kernel.number(sizes);
        let kept: Vec<_> = launches.kept.iter().map(|kept| kept.elements(&number)).collect();
        let mut grids = Vec::new();
        for (stage, ir, shape) in &launches.stages {
            let grid = self.grid(kernel, shape, &number)?;
            let operands: Vec<_> = stage.inputs.iter().chain([&stage.output]).copied().collect();
            // All parameters of a kernel that comes to several are read, so they are numbered as its buffers are.
            let len = |operand: &Operand| match *operand {
                Operand::Param(n) => params[n],
                Operand::Kept(n) => kept[n].1,
                Operand::Output => output,
            };
            let lens: Vec<_> = operands.iter().map(len).collect();
            if grid.0 > 0 {
                grids.push((OneGrid::new(ir.clone(), grid, sizes, &lens), operands));
            }
        }
        Ok(Staged { kept, grids })
    }

    /// Several launches with memory of the device in between.
    pub(super) fn run_stages(
        &mut self,
        staged: &Staged,
        launch: &Ready<'_>,
        when: When,
    ) -> Result<(), DeviceError> {
        let buffers = &launch.buffers;
        let kept = staged.kept.iter().map(|&(dtype, len)| self.alloc(dtype, len));
        let kept = kept.collect::<Result<Vec<_>, _>>()?;
        for (grid, operands) in &staged.grids {
            let at = |operand: &Operand| match *operand {
                Operand::Param(n) => buffers[n],
                Operand::Kept(n) => &kept[n],
                Operand::Output => buffers[buffers.len() - 1],
            };
            self.enqueue(grid, operands.iter().map(at), when)?;
        }
        Ok(())
    }

    /// A streamed softmax as two launches.
    pub(super) fn run_halves(
        &mut self,
        halves: &Halves,
        launch: &Ready<'_>,
        when: When,
    ) -> Result<(), DeviceError> {
        // Launches of one thread follow one another on the device, so all of them can have the same memory in between.
        let here = std::thread::current().id();
        let kept = match self.between.take() {
            Some((thread, kept)) if thread == here && kept.len() >= halves.scratch => kept,
            _ => self.alloc(DType::F32, halves.scratch)?,
        };
        let [(part, reads), (merge, merges)] = &halves.grids;
        let given = |numbers: &'_ [usize]| numbers.iter().map(|&n| launch.buffers[n]).collect::<Vec<_>>();
        self.enqueue(part, given(reads).into_iter().chain([&kept]), when)?;
        let merged = given(merges).into_iter().chain([&kept]).chain(launch.buffers.last().copied());
        self.enqueue(merge, merged, when)?;
        self.between = Some((here, kept));
        Ok(())
    }
}

/// Whether a buffer can stand for a value of the body, which has so many elements.
fn fits(
    kernel: &Kernel,
    (value, (dtype, len)): (ValueId, (DType, usize)),
    buffer: &CubeBuffer,
) -> Result<(), DeviceError> {
    if dtype != buffer.dtype() || len > buffer.len() {
        let given = format!("{} of {}", buffer.len(), buffer.dtype());
        let name = &kernel.body.value(value).name;
        return Err(refuse(kernel, format!("`{name}` has {len} elements of {dtype}, the buffer {given}")));
    }
    Ok(())
}
