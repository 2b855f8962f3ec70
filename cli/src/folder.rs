//! A folder that appears under its name complete or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// A folder under a temporary name beside its place. Dropped before it is published, it is removed.
pub(crate) struct NewFolder {
    temporary: PathBuf,
    place: PathBuf,
}

impl NewFolder {
    /// Begins a folder at `place`, where there must be nothing, an empty folder, or one that is `replaceable`; else `advice` says why.
    pub(crate) fn begin(
        place: &Path,
        replaceable: impl Fn(&Path) -> bool,
        advice: &str,
    ) -> anyhow::Result<NewFolder> {
        let shown = place.display();
        match fs::read_dir(place) {
            Ok(mut entries) => {
                if entries.next().is_some() && !replaceable(place) {
                    bail!("{shown}: the folder is not empty and {advice}; give another folder or remove it");
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("{shown}: cannot write the output folder here")),
        }
        let absolute =
            std::path::absolute(place).with_context(|| format!("{shown}: not a path of a folder"))?;
        let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
            bail!("{shown}: not a path of a folder; give one that can be made, such as ./out");
        };
        let cannot = || format!("{shown}: cannot write the output folder");
        fs::create_dir_all(parent).with_context(cannot)?;
        let temporary = parent.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&temporary).with_context(cannot)?;
        Ok(NewFolder { temporary, place: absolute })
    }

    /// Where to write until then.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes a file, `/` in its name being a folder.
    pub(crate) fn write(&self, name: &str, text: &(impl AsRef<[u8]> + ?Sized)) -> anyhow::Result<()> {
        let path = self.temporary.join(name);
        let cannot = || format!("{}: cannot write {name}", self.place.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(cannot)?;
        }
        let file = File::create(&path).with_context(cannot)?;
        (&file).write_all(text.as_ref()).and_then(|()| file.sync_all()).with_context(cannot)
    }

    /// Gives the folder its name. What was there before is moved aside and then removed.
    pub(crate) fn publish(self) -> anyhow::Result<()> {
        let cannot = || format!("{}: cannot give the finished folder its name", self.place.display());
        sync(&self.temporary);
        let aside = self.temporary.with_extension("old");
        match fs::rename(&self.place, &aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(cannot),
            _ => {}
        }
        if let Err(e) = fs::rename(&self.temporary, &self.place) {
            // What was there must not be lost for it.
            let _ = fs::rename(&aside, &self.place);
            return Err(e).with_context(cannot);
        }
        if let Some(parent) = self.place.parent() {
            sync(parent);
        }
        match fs::remove_dir_all(&aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("{}: cannot remove what was replaced", aside.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Waits until the names in a folder are on disk. Not every file system can be asked for that.
pub(crate) fn sync(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // Once published there is nothing of this name, and that is as well.
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

/// Writes the file beside its place first, so that it appears complete or not at all.
pub(crate) fn write_file(out: &Path, text: &str) -> anyhow::Result<()> {
    let shown = out.display();
    let Some(name) = out.file_name() else { bail!("{shown}: not a path of a file") };
    let temporary = out.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let done = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, out));
    if done.is_err() {
        // It may not even have been made.
        let _ = fs::remove_file(&temporary);
    }
    done.with_context(|| format!("{shown}: cannot write"))
}
