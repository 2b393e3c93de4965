//! A throwaway root: this system's files under an overlay, in a mount namespace of its own.
//!
//! What is installed, changed or removed within lies in memory and is gone with the value; a service manager is
//! there by name only, and what it is told is written down.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{Answer, Namespace, Process, Scratch, relay::CALL};

/// Makes the root below its first argument, enters it, and stays until its stdin ends.
const SCRIPT: &str = r#"
set -e
mount -t tmpfs -o mode=755 tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
for shared in proc dev sys; do mount --rbind "/$shared" "root/$shared"; done
mount -t bpf bpf root/sys/fs/bpf
for own in run tmp; do mount -t tmpfs tmpfs "root/$own"; done
# What containers have, and a machine has not.
rm -rf root/etc/dpkg/dpkg.cfg.d root/usr/sbin/policy-rc.d
# Nor does each call need the index of all manual pages anew.
rm -f root/usr/bin/systemctl root/var/lib/man-db/auto-update
cat > root/usr/bin/systemctl <<'FAKE'
#!/bin/sh
echo "$*" >> /run/systemctl
case "$*" in
*is-active*) [ -S /run/mcr/mcr.sock ] ;;
*preset*) wants=/etc/systemd/system/multi-user.target.wants
    mkdir -p $wants && ln -sf /usr/lib/systemd/system/mcr.service $wants ;;
*is-enabled*) [ -L /etc/systemd/system/multi-user.target.wants/mcr.service ] && echo enabled ;;
*reload\ mcr.service) sh -c "$(sed -n 's/^ExecReload=//p' /usr/lib/systemd/system/mcr.service)" ;;
esac
FAKE
chmod 755 root/usr/bin/systemctl
if dpkg --root=root -s mcr > root/run/dpkg 2>&1; then chroot root dpkg --purge mcr > root/run/dpkg; fi
mkdir -p root/run/systemd/system
: > root/run/systemctl
exec chroot root sh -c 'echo ready && exec cat'
"#;

/// Gone on drop, with all that was done in it.
#[derive(Debug)]
pub struct Root {
    keeper: Child,
    /// Where it is mounted, in the keeper's mount namespace.
    scratch: Scratch,
}

impl Root {
    #[track_caller]
    pub fn make() -> Self {
        let scratch = Scratch::make();
        let mut keeper = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"])
            .arg(scratch.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare (util-linux)");
        let mut line = String::new();
        let stdout = keeper.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("read a pipe");
        if line != "ready\n" {
            let mut why = String::new();
            let _unreadable = keeper.stderr.take().expect("piped").read_to_string(&mut why);
            panic!("no throwaway root (root and overlayfs needed): {why}");
        }
        Self { keeper, scratch }
    }

    /// A file of the root, as it is reached from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.keeper.id()));
        root.join(inside.trim_start_matches('/'))
    }

    #[track_caller]
    pub fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside)).unwrap_or_else(|error| panic!("{inside}: {error}"))
    }

    #[track_caller]
    pub fn write(&self, inside: &str, text: &str) {
        fs::write(self.path(inside), text).unwrap_or_else(|error| panic!("{inside}: {error}"));
    }

    /// Copies a file from outside into the root's `/tmp`; its path inside.
    #[track_caller]
    pub fn bring(&self, file: &Path) -> String {
        let inside = format!("/tmp/{}", file.file_name().expect("a file").display());
        fs::copy(file, self.path(&inside)).expect("copy a file into the root");
        inside
    }

    /// Runs a command in the root to its end.
    #[track_caller]
    pub fn run(&self, command: &[&str]) -> Answer {
        let mut enter = Command::new("nsenter");
        Process::spawn(self.enter(&mut enter).args(command)).answer(CALL)
    }

    /// A command that will run in the root and in a network namespace.
    pub fn command(&self, namespace: &Namespace, command: &[&str]) -> Command {
        let mut enter = namespace.command("nsenter");
        self.enter(&mut enter).args(command);
        enter
    }

    fn enter<'a>(&self, nsenter: &'a mut Command) -> &'a mut Command {
        let keeper = self.keeper.id().to_string();
        nsenter.args(["--target", &keeper, "--mount", "--root", "--wd"])
    }

    /// What the service manager was told since this was asked last, what only asks or enables left out.
    #[track_caller]
    pub fn told(&self) -> Vec<String> {
        let told = self.read("/run/systemctl");
        self.write("/run/systemctl", "");
        told.lines()
            .filter(|line| !line.contains("is-") && !line.contains("preset"))
            .map(str::to_owned)
            .collect()
    }

    /// What was made or changed in the root and is still there.
    pub fn changed(&self) -> Vec<PathBuf> {
        // The overlay's upper layer is not within the root, but in its mount namespace all the same.
        let upper = self.scratch.dir().join("upper");
        let mut find = Command::new("nsenter");
        find.args(["--target", &self.keeper.id().to_string(), "--mount", "find"])
            .arg(&upper)
            .args(["-printf", "/%P\\n"]);
        Process::spawn(&mut find).answer(CALL).ok().lines().map(PathBuf::from).collect()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ended_already = self.keeper.kill();
        let _reaped_already = self.keeper.wait();
    }
}
