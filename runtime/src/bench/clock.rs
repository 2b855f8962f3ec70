//! How long a launch takes on a device that takes launches faster, or slower, than it does them.

use std::time::Instant;

use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::program::Kernel;

/// Launches whose queue takes this long, in seconds, are timed together.
const TOGETHER: f64 = 5e-3;
/// The most launches that are timed together: a driver's queue has room for them.
const MOST: usize = 100;
/// Launches that take longer than so many seconds keep a queue filled by themselves.
const LONG: f64 = 2e-4;

/// Times launches. Where a device has a queue, so many launches that it is long go into it behind a copy that takes longer than the
/// host needs to enqueue them all; the same with a fifth of them, and the difference is what the launches take, one behind the
/// other, with nothing of the host's in it.
pub(super) struct Clock<D: Device> {
    /// What fills a queue; none where launches are done when they return.
    pub(super) queue: Option<Copying<D>>,
}

/// A large copy.
pub(super) struct Copying<D: Device> {
    pub(super) kernel: Kernel,
    pub(super) from: D::Buffer,
    pub(super) to: D::Buffer,
    /// Its rows.
    pub(super) rows: usize,
    /// How long it takes.
    pub(super) seconds: f64,
}

impl<D: Device> Copying<D> {
    pub(super) fn launch(&mut self, device: &mut D) -> Result<(), DeviceError> {
        device.launch(&self.kernel, &[Some(&self.from)], &mut self.to, &[self.rows])
    }
}

impl<D: Device> Clock<D> {
    /// How many copies keep the device busy for so many seconds and half as many more.
    pub(super) fn copies(&self, seconds: f64) -> usize {
        self.queue.as_ref().map_or(0, |copying| (seconds * 1.5 / copying.seconds).ceil() as usize)
    }

    /// Launches a copy, if the device has a queue.
    pub(super) fn copy(&mut self, device: &mut D) -> Result<(), DeviceError> {
        self.queue.as_mut().map_or(Ok(()), |copying| copying.launch(device))
    }

    /// The seconds of one launch, so many times.
    pub(super) fn samples(
        &mut self,
        device: &mut D,
        samples: usize,
        mut launch: impl FnMut(&mut D) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        // The first compiles, the second tells how many to time together.
        self.span(device, 0, 1, &mut launch)?;
        let mut each = self.span(device, 0, 1, &mut launch)?;
        if each < LONG {
            each = self.span(device, 0, 16, &mut launch)? / 16.0;
        }
        let together = ((TOGETHER / each.max(1e-9)) as usize).clamp(1, MOST);
        let busy = match &self.queue {
            // What was just measured has the host's part in it, so the copy lasts until all launches are enqueued.
            Some(_) if each < LONG => self.copies(together as f64 * each),
            Some(_) | None => 0,
        };
        let few = (together / 5).max(1);
        let mut all = Vec::with_capacity(samples);
        for _ in 0..samples {
            let long = self.span(device, busy, together, &mut launch)?;
            let alone = if busy > 0 && few < together {
                (long - self.span(device, busy, few, &mut launch)?) / (together - few) as f64
            } else {
                long / together as f64
            };
            // A difference that is lost in noise: what the host needs is an upper bound.
            all.push(if alone > 0.0 { alone } else { each });
        }
        Ok(all)
    }

    /// From a device that waits to one that waits again.
    fn span(
        &mut self,
        device: &mut D,
        busy: usize,
        launches: usize,
        launch: &mut impl FnMut(&mut D) -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        device.wait()?;
        let start = Instant::now();
        for _ in 0..busy {
            self.copy(device)?;
        }
        for _ in 0..launches {
            launch(device)?;
        }
        device.wait()?;
        Ok(start.elapsed().as_secs_f64().max(1e-9))
    }
}
