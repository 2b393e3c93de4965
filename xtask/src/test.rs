//! `cargo xtask test`: every test, built as the user and run as root, since tests make network namespaces.
//!
//! The test binaries are run one by one, so that nothing but them needs root and `target/` stays the user's.
//! All are run, also when some fail; what failed is listed before the last summary.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{self, BufRead, BufReader, Write},
    path::Path,
    process::{Command, ExitStatus, Stdio, exit},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    process,
    run::{self, Artifact},
    setup,
};

/// Build everything as the user and run all tests as root
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments of the test runner, such as a part of a test's name
    #[arg(last = true)]
    args: Vec<OsString>,
}

/// The package whose tests send traffic at real rates: one at a time, and last.
const END_TO_END: &str = "tests";

/// mcr-ebpf is not for the host.
const WORKSPACE: [&str; 3] = ["--workspace", "--exclude", "mcr-ebpf"];

pub fn main(args: &Args) -> Result<()> {
    setup::build()?;
    setup::test()?;
    setup::promtool::ensure()?;
    let mut tests = build(&["--lib", "--bins", "--tests"])?;
    tests.sort_by_key(is_end_to_end);
    let mut outcome = Outcome::default();
    if args.args.is_empty() {
        outcome.documentation = documentation()?;
    }
    if run_all(&tests, &args.args, &[], outcome)? > 0 {
        // With no word more: the last lines are the test runner's.
        exit(1);
    }
    Ok(())
}

/// Runs the packet table of the XDP program on an object.
pub fn packet_table(object: &Path) -> Result<()> {
    setup::build()?;
    setup::test()?;
    let tests = build(&["--test", "packet_table"])?;
    match run_all(&tests, &[], &[("MCR_BPF_OBJECT", object)], Outcome::default())? {
        0 => Ok(()),
        failed => bail!("{failed} tests failed"),
    }
}

/// Runs the soak for so many seconds on each datapath, and shows how it goes.
pub fn soak(seconds: u32) -> Result<()> {
    setup::build()?;
    setup::test()?;
    let tests = build(&["--bins", "--test", "soak"])?;
    let seconds = seconds.to_string();
    let variables = [("MCR_SOAK_SECONDS", Path::new(&seconds))];
    match run_all(&tests, &["--nocapture".into()], &variables, Outcome::default())? {
        0 => Ok(()),
        failed => bail!("{failed} tests failed"),
    }
}

/// Builds targets of the whole workspace, so that all share one choice of features; the test binaries.
fn build(targets: &[&str]) -> Result<Vec<Artifact>> {
    let mut cargo = process::cargo()?;
    cargo.args(["build", "--message-format", run::MESSAGES]).args(WORKSPACE).args(targets);
    let mut built = run::artifacts(&mut cargo)?;
    built.retain(|artifact| artifact.is_test);
    built.sort_by(|a, b| (&a.manifest, &a.kind, &a.target).cmp(&(&b.manifest, &b.kind, &b.target)));
    Ok(built)
}

fn is_end_to_end(test: &Artifact) -> bool {
    test.manifest.parent().is_some_and(|folder| folder.ends_with(END_TO_END))
}

/// Examples in documentation need no root, and rustdoc writes to `target/`.
fn documentation() -> Result<Option<ExitStatus>> {
    let mut cargo = process::cargo()?;
    cargo.args(["test", "--doc", "--quiet", "--no-fail-fast"]).args(WORKSPACE);
    println!("\nexamples in the documentation: {}", process::line(&cargo));
    Ok(Some(cargo.status().context("cannot start cargo")?))
}

#[derive(Debug, Default)]
struct Outcome {
    documentation: Option<ExitStatus>,
    failed: Vec<String>,
}

/// Runs test binaries one after another; how much failed. What is printed last is the last one's own summary.
fn run_all(
    tests: &[Artifact],
    args: &[OsString],
    variables: &[(&str, &Path)],
    mut outcome: Outcome,
) -> Result<usize> {
    if outcome.documentation.is_some_and(|status| !status.success()) {
        outcome.failed.push("examples in the documentation".to_owned());
    }
    let mut chosen = Vec::new();
    for test in tests {
        if has_tests(test, args)? {
            chosen.push(test);
        }
    }
    let Some((last, others)) = chosen.split_last() else {
        let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        bail!("no test is chosen by `{}`: give a part of a test's name", args.join(" "));
    };
    for test in others {
        let summary = run_one(test, args, variables, &mut outcome)?;
        print!("{summary}");
    }
    let summary = run_one(last, args, variables, &mut outcome)?;
    if !outcome.failed.is_empty() {
        println!("\n{} failed, in {} test binaries:", outcome.failed.len(), chosen.len());
        for name in &outcome.failed {
            println!("    {name}");
        }
        println!();
    }
    print!("{summary}");
    io::stdout().flush()?;
    Ok(outcome.failed.len())
}

fn has_tests(test: &Artifact, args: &[OsString]) -> Result<bool> {
    let mut command = Command::new(&test.executable);
    command.args(args).args(["--list", "--format", "terse"]).current_dir(folder(test)?);
    Ok(process::output(&mut command)?.lines().any(|line| line.ends_with(": test")))
}

/// Runs one binary; prints all but its closing summary, which is returned.
fn run_one(
    test: &Artifact,
    args: &[OsString],
    variables: &[(&str, &Path)],
    outcome: &mut Outcome,
) -> Result<String> {
    let mut command = process::as_root("env")?;
    for (name, value) in env::vars_os() {
        // sudo drops what the tests may be told by.
        let name_text = name.to_string_lossy();
        if ["RUST_", "MCR_", "PROPTEST_"].iter().any(|prefix| name_text.starts_with(prefix)) {
            command.arg(assignment(&name, &value));
        }
    }
    if is_end_to_end(test) {
        command.arg("RUST_TEST_THREADS=1");
    }
    for (name, value) in variables {
        command.arg(assignment(name.as_ref(), value.as_os_str()));
    }
    command.arg(&test.executable).args(args).current_dir(folder(test)?);

    let title = format!("{} {} ({})", test.kind, test.target, folder(test)?.display());
    println!("\nrunning the tests of {title}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", process::line(&command)))?;
    let stdout = child.stdout.take().context("a test without output")?;
    let mut output = Output::default();
    let read = output.follow(&mut BufReader::new(stdout), &mut io::stdout());
    let status = child.wait()?;
    read?;
    if !status.success() {
        let names = output.failures.unwrap_or_default();
        if names.is_empty() {
            outcome.failed.push(format!("{title} ended with {status}"));
        }
        outcome.failed.extend(names.iter().map(|name| format!("{}: {name}", test.target)));
    }
    Ok(output.summary)
}

fn assignment(name: &OsStr, value: &OsStr) -> OsString {
    let mut assignment = name.to_owned();
    assignment.push("=");
    assignment.push(value);
    assignment
}

/// cargo runs a package's tests in the package's folder.
fn folder(test: &Artifact) -> Result<&Path> {
    test.manifest.parent().context("a package without a folder")
}

/// What a test binary prints, followed as it comes.
#[derive(Debug, Default)]
struct Output {
    /// Names under the last heading `failures:`.
    failures: Option<Vec<String>>,
    /// `test result: ...` and what follows.
    summary: String,
}

const SUMMARY: &[u8] = b"test result:";

impl Output {
    /// Prints what comes when it comes, so that a test that hangs can be seen by its name.
    fn follow(&mut self, from: &mut impl BufRead, to: &mut impl Write) -> Result<()> {
        let mut line = Vec::new();
        let mut printed = 0;
        loop {
            let chunk = from.fill_buf()?;
            if chunk.is_empty() {
                return Ok(());
            }
            let length = chunk.iter().position(|&byte| byte == b'\n').map_or(chunk.len(), |end| end + 1);
            line.extend_from_slice(&chunk[..length]);
            from.consume(length);
            let may_be_summary = line.starts_with(SUMMARY) || SUMMARY.starts_with(&line);
            if !may_be_summary && self.summary.is_empty() {
                to.write_all(&line[printed..])?;
                to.flush()?;
                printed = line.len();
            }
            if line.ends_with(b"\n") {
                self.take(&String::from_utf8_lossy(&line));
                line.clear();
                printed = 0;
            }
        }
    }

    fn take(&mut self, line: &str) {
        if line.as_bytes().starts_with(SUMMARY) || !self.summary.is_empty() {
            self.summary.push_str(line);
        } else if line.trim_end() == "failures:" {
            // Printed twice: over the output of each, then over the list.
            self.failures = Some(Vec::new());
        } else if let (Some(failures), Some(name)) = (&mut self.failures, line.strip_prefix("    ")) {
            failures.push(name.trim_end().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_held_back_and_the_last_list_of_failures_is_read() {
        let printed = "running 2 tests\n    indented\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n\
                       ---- b stdout ----\n    not a name\n\nfailures:\n    b\n\n";
        let summary = "test result: FAILED. 1 passed; 1 failed\n\n";
        let whole = format!("{printed}{summary}");
        // However the bytes arrive.
        for size in [1, 7, 1000] {
            let mut output = Output::default();
            let mut shown = Vec::new();
            let mut from = BufReader::with_capacity(size, whole.as_bytes());
            output.follow(&mut from, &mut shown).expect("memory can be read and written");
            assert_eq!(String::from_utf8_lossy(&shown), printed);
            assert_eq!(output.summary, summary);
            assert_eq!(output.failures.as_deref(), Some(&["b".to_owned()][..]));
        }
    }
}
