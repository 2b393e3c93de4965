//! `mcr rule`: what is relayed where. Names and endpoints are parsed here already, so that what is no
//! endpoint is answered without a daemon.

mod render;

use clap::{ArgGroup, Subcommand};

use super::remote::Remote;
use crate::{
    api::wire::{Request, RuleChange, RuleOutcome, RuleRef, RuleRemoval, RuleSpec},
    rule::{DatapathChoice, Input, Output, RuleError, RuleName},
};

/// Add, change, remove, list and show rules
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Relay a group to one output or more
    Add(Add),
    /// Add or remove outputs of a rule, or change its datapath; the other outputs lose nothing
    Set(Set),
    /// Remove a rule; once this returns, not one more datagram of it leaves
    Remove {
        /// The rule's name
        name: String,
        /// Take it out of what was saved, too
        #[arg(long)]
        save: bool,
    },
    /// List the rules
    List,
    /// Show a rule: its outputs, its datapath and why, what the host still sees
    Show {
        /// The rule's name
        name: String,
    },
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The rule's name [default: derived from the input]
    name: Option<String>,
    /// What to receive: GROUP:PORT@INTERFACE[,source=ADDRESS]
    #[arg(long = "in", value_name = "ENDPOINT")]
    input: String,
    /// Where to send it, once per output: GROUP-OR-HOST:PORT@INTERFACE[,ttl=N|copy|dec][,dscp=N|copy]
    /// [,from=ADDRESS[:PORT]][,gso=false][,loop=true]
    #[arg(long = "out", value_name = "ENDPOINT", required = true)]
    outputs: Vec<String>,
    /// auto, redirect, af-xdp or af-packet [default: the daemon's]
    #[arg(long, value_parser = str::parse::<DatapathChoice>)]
    datapath: Option<DatapathChoice>,
    #[command(flatten)]
    consent: Consent,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true))]
struct Set {
    /// The rule's name
    name: String,
    /// Send to this one too
    #[arg(long, value_name = "ENDPOINT", group = "change")]
    add_out: Vec<String>,
    /// Send to this one no more; its options need not be repeated
    #[arg(long, value_name = "ENDPOINT", group = "change")]
    del_out: Vec<String>,
    /// auto, redirect, af-xdp or af-packet
    #[arg(long, value_parser = str::parse::<DatapathChoice>, group = "change")]
    datapath: Option<DatapathChoice>,
    #[command(flatten)]
    consent: Consent,
}

/// What is not done unless it is said to be meant.
#[derive(Debug, clap::Args)]
struct Consent {
    /// Other rules may feed the same output
    #[arg(long)]
    merge: bool,
    /// Groups in 224.0.0.0/24 are meant
    #[arg(long)]
    link_local: bool,
    /// Make it permanent, in a fragment of mcr's own beside the daemon's --config
    #[arg(long)]
    save: bool,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::List => self.remote.ask(&Request::RuleList, render::list),
            Command::Show { name } => {
                let name = canonical::<RuleName>(&name)?;
                self.remote.ask(&Request::RuleShow(RuleRef { name }), render::show)
            }
            Command::Add(add) => change(&self.remote, &Request::RuleAdd(add.spec()?)),
            Command::Set(set) => change(&self.remote, &Request::RuleSet(set.change()?)),
            Command::Remove { name, save } => {
                let name = canonical::<RuleName>(&name)?;
                change(&self.remote, &Request::RuleRemove(RuleRemoval { name, save }))
            }
        }
    }
}

fn change(remote: &Remote, request: &Request) -> anyhow::Result<()> {
    let outcome: RuleOutcome = remote.call(request)?;
    remote.warn(&outcome.warnings);
    remote.show(&outcome, |outcome, _| render::outcome(outcome))
}

/// The one way to write what `text` says.
fn canonical<T: std::str::FromStr<Err = RuleError> + ToString>(text: &str) -> Result<String, RuleError> {
    text.parse::<T>().map(|value| value.to_string())
}

fn outputs(texts: &[String]) -> Result<Vec<String>, RuleError> {
    texts.iter().map(|text| canonical::<Output>(text)).collect()
}

impl Add {
    fn spec(self) -> Result<RuleSpec, RuleError> {
        Ok(RuleSpec {
            name: self.name.map(|name| canonical::<RuleName>(&name)).transpose()?,
            input: canonical::<Input>(&self.input)?,
            outputs: outputs(&self.outputs)?,
            datapath: self.datapath.map(|datapath| datapath.to_string()),
            merge: self.consent.merge,
            link_local: self.consent.link_local,
            save: self.consent.save,
        })
    }
}

impl Set {
    fn change(self) -> Result<RuleChange, RuleError> {
        Ok(RuleChange {
            name: canonical::<RuleName>(&self.name)?,
            add_out: outputs(&self.add_out)?,
            del_out: outputs(&self.del_out)?,
            datapath: self.datapath.map(|datapath| datapath.to_string()),
            merge: self.consent.merge,
            link_local: self.consent.link_local,
            save: self.consent.save,
        })
    }
}
