//! Files that are there whole or not at all, whatever ends the process or the machine meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
};

/// Puts a file of these bytes in the place of what was there, a link included.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    put(path, bytes, mode, None)
}

/// Writes a person's file: through links, and with the mode and the owner that it has.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => put(path, bytes, 0o644, None),
        Err(error) => Err(error),
        Ok(_) => {
            let path = fs::canonicalize(path)?;
            let there = fs::metadata(&path)?;
            if !there.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            put(&path, bytes, there.mode() & 0o7777, Some((there.uid(), there.gid())))
        }
    }
}

fn put(path: &Path, bytes: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let new = beside(path)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    let given = match owner {
        Some((uid, gid)) if file.metadata().is_ok_and(|made| (made.uid(), made.gid()) != (uid, gid)) => {
            fchown(&file, Some(uid), Some(gid))
        }
        _ => Ok(()),
    };
    let written = given
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    // The name is on the disk when its directory is; that it cannot be made sure undoes nothing.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
    Ok(())
}

/// A name that nobody else chooses; what a process of this number left there is removed.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".mcr-{}", std::process::id()));
    let new = path.with_file_name(name);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(new),
    }
}
