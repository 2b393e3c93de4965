//! What a daemon leaves to the one that comes after it: the rules that were added by command, and the source
//! port that was chosen. Written whole at each change, checked on reading; it does not outlive a reboot.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;
use tracing::{info, warn};

use crate::{api::wire::RuleSpec, config::Source, supervisor::books::Offsets, sys::whole_file};

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The source port, if the daemon chose it.
    pub source_port: Option<u16>,
    pub rules: Vec<RuleSpec>,
    /// The files as they were confirmed last, while those on the disk hold a load that nobody confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<Vec<Source>>,
    /// Where the daemon pins what it has in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<PathBuf>,
    /// What of the counters in the kernel is each rule's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub offsets: Vec<Offsets>,
}

/// The first word of a journal, with the version of its form.
const MAGIC: &str = "mcr-journal-1";

/// Why a journal says nothing.
#[derive(Debug, Error)]
enum Torn {
    #[error("it is not whole")]
    Checksum,
    #[error("its form is another version's")]
    Form,
    #[error("it is user {0}'s, in a directory where all may write")]
    Foreign(u32),
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot_id: String,
    /// What stands in it, as far as this process knows.
    written: Option<Vec<u8>>,
}

impl Journal {
    /// Opens the journal and reads what a daemon before left in it. One that cannot be believed is set aside, and said.
    pub fn open(path: PathBuf) -> (Self, Memory) {
        let journal = Self { path, boot_id: boot_id(), written: None };
        let memory = match read(&journal.path, &journal.boot_id) {
            Ok(memory) => memory.unwrap_or_default(),
            Err(torn) => {
                let aside = journal.path.with_extension("journal.torn");
                let kept = match fs::rename(&journal.path, &aside) {
                    Ok(()) => format!("it is kept as {}", aside.display()),
                    Err(error) => format!("it cannot be set aside: {error}"),
                };
                warn!(
                    journal = %journal.path.display(),
                    "rules that were added by command are lost, the journal says nothing: {torn}; {kept}"
                );
                Memory::default()
            }
        };
        (journal, memory)
    }

    /// Writes down what is to be remembered, if that has changed.
    ///
    /// # Errors
    ///
    /// That of the file system; what stood there stands still.
    pub fn keep(&mut self, memory: &Memory) -> io::Result<()> {
        let bytes = text(memory, &self.boot_id)?;
        if self.written.as_deref() != Some(&bytes[..]) {
            whole_file::replace(&self.path, &bytes, 0o640)?;
            self.written = Some(bytes);
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where a daemon that is gone has its pins, as far as that can be read from here.
pub fn pins_left(journal: &Path) -> Option<PathBuf> {
    read(journal, &boot_id()).ok().flatten()?.pins
}

/// Whether a file beside the socket can be what a daemon left.
pub fn ours(path: &Path, metadata: &fs::Metadata) -> bool {
    let for_all =
        |directory: &Path| fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o002 != 0);
    let one_of_us = [0, nix::unistd::geteuid().as_raw()].contains(&metadata.uid());
    let closed = path.parent().is_some_and(|directory| !for_all(directory));
    metadata.is_file() && metadata.nlink() == 1 && metadata.mode() & 0o022 == 0 && (one_of_us || closed)
}

/// `MAGIC SHA256 BOOT-ID` and a line of JSON; the sum is of what follows it.
fn text(memory: &Memory, boot_id: &str) -> io::Result<Vec<u8>> {
    let body = format!("{boot_id}\n{}\n", serde_json::to_string(memory)?);
    Ok(format!("{MAGIC} {} {body}", sum(&body)).into_bytes())
}

fn sum(text: &str) -> String {
    Sha256::digest(text).iter().fold(String::new(), |sum, byte| sum + &format!("{byte:02x}"))
}

/// What stands in a journal; none if there is no journal. In a directory that is not for all to write to, whoever put it
/// there could.
fn read(path: &Path, boot_id: &str) -> Result<Option<Memory>, Torn> {
    if let Ok(metadata) = fs::symlink_metadata(path)
        && !ours(path, &metadata)
    {
        return Err(Torn::Foreign(metadata.uid()));
    }
    let open = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let bytes = match open.and_then(|mut file| io::read_to_string(&mut file)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(Torn::Checksum),
        Err(error) => return Err(error.into()),
    };
    let mut memory = parse(&bytes, boot_id)?;
    if let Some(rules) = memory.of_another_boot {
        info!(
            rules,
            "the machine has been started anew: rules that were added by command are gone, as they should"
        );
        memory.kept.rules.clear();
        memory.kept.offsets.clear();
    }
    Ok(Some(memory.kept))
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    kept: Memory,
    /// How many rules were written down before a reboot.
    of_another_boot: Option<usize>,
}

fn parse(text: &str, boot_id: &str) -> Result<Parsed, Torn> {
    let (magic, rest) = text.split_once(' ').ok_or(Torn::Checksum)?;
    if magic != MAGIC {
        return Err(if magic.starts_with("mcr-journal-") { Torn::Form } else { Torn::Checksum });
    }
    let (written, body) = rest.split_once(' ').ok_or(Torn::Checksum)?;
    if written != sum(body) {
        return Err(Torn::Checksum);
    }
    let (boot, line) = body.split_once('\n').ok_or(Torn::Checksum)?;
    let kept: Memory = serde_json::from_str(line).map_err(|_| Torn::Form)?;
    let of_another_boot = (boot != boot_id).then_some(kept.rules.len());
    Ok(Parsed { kept, of_another_boot })
}

/// Another one for each start of the machine.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        let rule = RuleSpec {
            name: Some("cam1".to_owned()),
            input: "239.1.1.1:5000@eth0".to_owned(),
            outputs: vec!["239.2.2.2:6000@eth1".to_owned()],
            ..RuleSpec::default()
        };
        Memory { source_port: Some(40_000), rules: vec![rule], ..Memory::default() }
    }

    fn written() -> String {
        String::from_utf8(text(&memory(), "boot").unwrap()).unwrap()
    }

    #[test]
    fn what_was_written_is_read() {
        let parsed = parse(&written(), "boot").unwrap();
        assert_eq!(parsed, Parsed { kept: memory(), of_another_boot: None });
    }

    #[test]
    fn a_journal_of_before_a_reboot_is_told() {
        assert_eq!(parse(&written(), "later").unwrap().of_another_boot, Some(1));
    }

    #[test]
    fn no_torn_form_is_believed() {
        let whole = written();
        for end in 0..whole.len() {
            assert!(parse(&whole[..end], "boot").is_err(), "cut at {end}");
            let zeros = format!("{}{}", &whole[..end], "\0".repeat(whole.len() - end));
            assert!(parse(&zeros, "boot").is_err(), "zeros from {end}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone().into_bytes();
            flipped[at] ^= 1;
            assert!(parse(&String::from_utf8(flipped).unwrap(), "boot").is_err(), "a bit at {at}");
        }
        assert!(parse(&(whole.clone() + "x"), "boot").is_err());
        assert!(matches!(parse(&whole.replace(MAGIC, "mcr-journal-9"), "boot"), Err(Torn::Form)));
    }
}
