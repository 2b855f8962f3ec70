//! Machine code of kernels, kept in files from one process to the next.
//!
//! A compiler takes a tenth of a second and more for a kernel, and a model has some hundred: far longer than what they then do for the
//! first token. So what was compiled is kept, below the folder that [`CACHE`] names, or where users have their caches. A file holds all that
//! the code was made of, the text among it, beside the code: it is found by a digest of that, and used only if it holds the very same.
//! Files appear whole or not at all. What is damaged, foreign or cannot be read is as if it were not there, and what cannot be written is
//! compiled again next time. The folder stays below a size; what nobody has used for longest goes first. It may be deleted at any time.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::NamedTempFile;

use crate::digest::digest;

/// The environment variable that names the folder below which codes are kept; if it says [`OFF`], none are.
pub const CACHE: &str = "LATENTC_CACHE";
/// What turns it off.
pub const OFF: &str = "off";

/// Bytes of all files together, at most: some thousand kernels.
const MOST: u64 = 512 << 20;
/// What files begin with: their format.
const HEAD: &[u8; 16] = b"latentc code 1\n\0";

/// The folder with codes.
#[derive(Clone, Debug)]
pub(super) struct Codes {
    folder: PathBuf,
    most: u64,
}

impl Codes {
    /// Those of this user. `None` if none are to be kept, or there is no place for them.
    pub(super) fn of_user() -> Option<Codes> {
        let variable = |name| std::env::var_os(name);
        let cache = below(variable(CACHE), variable("XDG_CACHE_HOME"), std::env::home_dir())?;
        Some(Codes::at(cache.join("codes")))
    }

    /// Those in a folder, which need not be there.
    pub(super) fn at(folder: PathBuf) -> Codes {
        Codes { folder, most: MOST }
    }

    fn file(&self, made_of: &str) -> PathBuf {
        self.folder.join(format!("{:016x}", digest(made_of.bytes())))
    }

    /// What was made of that.
    pub(super) fn find(&self, made_of: &str) -> Option<Vec<u8>> {
        let path = self.file(made_of);
        let code = code(&fs::read(&path).ok()?, made_of)?.to_vec();
        // It was used today. Whoever may read and not write does without.
        let _ =
            File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(code)
    }

    /// Keeps what was made of that.
    ///
    /// # Errors
    /// If it cannot be written: it is compiled again next time.
    pub(super) fn keep(&self, made_of: &str, code: &[u8]) -> io::Result<()> {
        folders(&self.folder)?;
        let mut file = NamedTempFile::new_in(&self.folder)?;
        file.write_all(&written(made_of, code))?;
        file.persist(self.file(made_of))?;
        self.bound()
    }

    /// Deletes what was used longest ago, until the rest is small enough. Files that someone else deletes meanwhile are no matter.
    fn bound(&self) -> io::Result<()> {
        let mut files: Vec<_> = fs::read_dir(&self.folder)?
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let of = entry.metadata().ok().filter(fs::Metadata::is_file)?;
                Some((of.modified().ok()?, of.len(), entry.path()))
            })
            .collect();
        let mut all: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        if all > self.most {
            files.sort();
            for (_, bytes, path) in files {
                if all <= self.most {
                    break;
                }
                let _ = fs::remove_file(path);
                all -= bytes;
            }
        }
        Ok(())
    }
}

/// The folder for all that this program keeps: what it was told, or else its own in the user's folder of caches (XDG Base Directory
/// Specification, by which paths there are absolute).
fn below(told: Option<OsString>, caches: Option<OsString>, home: Option<PathBuf>) -> Option<PathBuf> {
    match told.filter(|told| !told.is_empty()) {
        Some(told) if told == OFF => None,
        Some(told) => Some(PathBuf::from(told)),
        None => {
            let caches = caches.map(PathBuf::from).filter(|path| path.is_absolute());
            let caches = caches.or_else(|| Some(home.filter(|home| home.is_absolute())?.join(".cache")));
            Some(caches?.join("latentc"))
        }
    }
}

/// Makes a folder and those above it, for this user alone.
fn folders(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

/// A file: head, the length of what the code was made of, a digest of all behind, that, and the code.
fn written(made_of: &str, code: &[u8]) -> Vec<u8> {
    let sum = digest(made_of.bytes().chain(code.iter().copied()));
    [HEAD, &(made_of.len() as u64).to_le_bytes()[..], &sum.to_le_bytes(), made_of.as_bytes(), code].concat()
}

/// The code in a file, if it is whole and was made of that.
fn code<'f>(file: &'f [u8], made_of: &str) -> Option<&'f [u8]> {
    let (len, rest) = file.strip_prefix(HEAD)?.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk()?;
    let same = u64::from_le_bytes(*len) == made_of.len() as u64;
    let code = rest.strip_prefix(made_of.as_bytes()).filter(|_| same)?;
    (digest(rest.iter().copied()) == u64::from_le_bytes(*sum)).then_some(code)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn codes() -> (tempfile::TempDir, Codes) {
        let folder = tempfile::tempdir().unwrap();
        let codes = Codes::at(folder.path().join("a/codes"));
        (folder, codes)
    }

    #[test]
    fn a_code_is_found_by_all_that_it_was_made_of() {
        let (_folder, codes) = codes();
        assert_eq!(codes.find("nvrtc 13.0\ntext"), None);
        codes.keep("nvrtc 13.0\ntext", b"one").unwrap();
        codes.keep("nvrtc 13.1\ntext", b"another").unwrap();
        assert_eq!(codes.find("nvrtc 13.0\ntext").as_deref(), Some(&b"one"[..]));
        assert_eq!(codes.find("nvrtc 13.1\ntext").as_deref(), Some(&b"another"[..]));
        assert_eq!(codes.find("nvrtc 13.0\ntext "), None);
        codes.keep("nvrtc 13.0\ntext", b"a later one").unwrap();
        assert_eq!(codes.find("nvrtc 13.0\ntext").as_deref(), Some(&b"a later one"[..]));
        let names = fs::read_dir(&codes.folder).unwrap().map(|e| e.unwrap().file_name().len());
        assert_eq!(names.collect::<Vec<_>>(), [16, 16], "nothing else is left in the folder");
    }

    #[test]
    fn what_is_damaged_or_foreign_is_not_there() {
        let (_folder, codes) = codes();
        codes.keep("text", b"code").unwrap();
        let path = codes.file("text");
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[n] ^= 4;
            fs::write(&path, damaged).unwrap();
            assert_eq!(codes.find("text"), None, "byte {n}");
            fs::write(&path, &whole[..n]).unwrap();
            assert_eq!(codes.find("text"), None, "{n} bytes of it");
        }
        // Another text that has, by chance, the same digest; and one that would end within the code.
        for other in ["test", "textc", "tex"] {
            fs::write(&path, written(other, b"code")).unwrap();
            assert_eq!(codes.find("text"), None, "{other}");
        }
        codes.keep("text", b"code").unwrap();
        assert_eq!(codes.find("text").as_deref(), Some(&b"code"[..]));
        // A folder in the place of a file is no code, and nothing takes its place.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(codes.find("text"), None);
        assert!(codes.keep("text", b"code").is_err());
    }

    #[test]
    fn whoever_reads_while_others_write_finds_a_whole_code_or_none() {
        let (_folder, codes) = codes();
        let of = |n: u8| vec![n; 1 << 16];
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let codes = &codes;
                scope.spawn(move || (0..20).for_each(|_| codes.keep("text", &of(writer)).unwrap()));
            }
            scope.spawn(|| {
                for _ in 0..100 {
                    let found = codes.find("text");
                    assert!(found.is_none_or(|code| code == of(code[0])));
                }
            });
        });
        assert!(codes.find("text").is_some());
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let (_folder, codes) = codes();
        let bytes = written("0", &[0; 100]).len() as u64;
        let codes = Codes { most: 3 * bytes, ..codes };
        let all = ["0", "1", "2"];
        for (n, made_of) in all.iter().enumerate() {
            codes.keep(made_of, &[0; 100]).unwrap();
            let file = File::options().append(true).open(codes.file(made_of)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(100 - n as u64)).unwrap();
        }
        assert!(all.iter().all(|made_of| fs::exists(codes.file(made_of)).unwrap()));
        // The first was written first, but is used now.
        codes.find("0").unwrap();
        codes.keep("3", &[0; 100]).unwrap();
        let there: Vec<_> = ["0", "1", "2", "3"].map(|of| codes.find(of).is_some()).into();
        assert_eq!(there, [true, false, true, true]);
    }

    #[test]
    fn the_folder_is_the_users_or_the_one_that_is_told() {
        let os = |text: &str| Some(OsString::from(text));
        let at = |told, caches, home: Option<&str>| {
            below(told, caches, home.map(PathBuf::from)).map(|path| path.display().to_string())
        };
        let is = |path: &str| Some(path.to_owned());
        assert_eq!(at(None, None, Some("/home/me")), is("/home/me/.cache/latentc"));
        assert_eq!(at(None, os("/caches"), Some("/home/me")), is("/caches/latentc"));
        assert_eq!(at(None, os("relative"), Some("/home/me")), is("/home/me/.cache/latentc"));
        assert_eq!(at(os(""), None, Some("/home/me")), is("/home/me/.cache/latentc"));
        assert_eq!(at(os("here"), os("/caches"), None), is("here"));
        assert_eq!(at(os("off"), os("/caches"), Some("/home/me")), None);
        assert_eq!(at(None, None, None), None);
    }
}
