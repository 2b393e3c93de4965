//! Where the metrics are served: as people type it, and bound.

use std::{
    fmt, fs, io,
    net::{Ipv6Addr, TcpListener},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::unistd::Gid;
use thiserror::Error;

use crate::api::socket::{self, MAX_PATH_BYTES};

const LOOPBACK: &str = "127.0.0.1";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IPv6 address without its brackets.
    Tcp {
        host: String,
        port: u16,
    },
    Unix(PathBuf),
}

/// Why a text is no [`Address`], or an address cannot be had.
#[derive(Debug, Error)]
pub enum AddressError {
    #[error("write a port (9464: on {LOOPBACK} alone), HOST:PORT, [ADDRESS]:PORT or unix:/PATH")]
    Form,
    #[error("a port is a number from 1 to 65535")]
    Port,
    #[error(
        "a socket is named by its whole path, of at most {MAX_PATH_BYTES} bytes, like unix:/run/mcr/metrics.sock"
    )]
    Path,
    #[error("metrics cannot be served on {address}: {why}; choose another --metrics")]
    Refused { address: Address, why: String },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text)) {
            let path = Path::new(path);
            let valid =
                path.is_absolute() && path.file_name().is_some() && socket::check_length(path).is_ok();
            return if valid { Ok(Self::Unix(path.to_owned())) } else { Err(AddressError::Path) };
        }
        let (host, port) = match text.rsplit_once(':') {
            None if text.bytes().all(|byte| byte.is_ascii_digit()) => (LOOPBACK, text),
            Some(("", port)) => (LOOPBACK, port),
            Some((host, port)) => (host, port),
            None => return Err(AddressError::Form),
        };
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(bracketed) if bracketed.parse::<Ipv6Addr>().is_ok() => bracketed,
            None if host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) => host,
            _ => return Err(AddressError::Form),
        };
        let port = Some(port).filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
        match port.and_then(|port| port.parse().ok()) {
            None | Some(0) => Err(AddressError::Port),
            Some(port) => Ok(Self::Tcp { host: host.to_owned(), port }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens. Dropping it removes its file.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, RemovedOnDrop),
}

#[derive(Debug)]
pub struct RemovedOnDrop(PathBuf);

impl Drop for RemovedOnDrop {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.0);
    }
}

impl Address {
    /// Listens, without blocking. A Unix socket is for the daemon's user and this group, as the control socket is.
    pub fn bind(&self, group: Option<Gid>) -> Result<Listener, AddressError> {
        let bound = match self {
            Self::Tcp { host, port } => TcpListener::bind((host.as_str(), *port)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(Listener::Tcp(listener))
            }),
            Self::Unix(path) => make_way(path).and_then(|()| {
                let listener = socket::listen(path, group)?;
                Ok(Listener::Unix(listener, RemovedOnDrop(path.clone())))
            }),
        };
        bound.map_err(|error| AddressError::Refused { address: self.clone(), why: why(&error) })
    }
}

/// Removes a socket that nobody listens on any more.
fn make_way(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    if !socket::is_socket(path) {
        return Err(io::Error::other("there is something else than a socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another program listens there".to_owned(),
        io::ErrorKind::AddrNotAvailable => "it is no address of this host".to_owned(),
        io::ErrorKind::PermissionDenied => format!("{error} (a port from 1024 on takes no privilege)"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_typed() {
        for (typed, meant) in [
            ("9464", "127.0.0.1:9464"),
            (":9464", "127.0.0.1:9464"),
            ("0.0.0.0:9464", "0.0.0.0:9464"),
            ("localhost:9464", "localhost:9464"),
            ("[::1]:9464", "[::1]:9464"),
            ("[::]:1", "[::]:1"),
            ("unix:/run/mcr/metrics.sock", "unix:/run/mcr/metrics.sock"),
            ("/run/mcr/metrics.sock", "unix:/run/mcr/metrics.sock"),
        ] {
            let address: Address = typed.parse().unwrap();
            assert_eq!(address.to_string(), meant, "{typed}");
            assert_eq!(meant.parse::<Address>().unwrap(), address, "{typed}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_right_form() {
        let long = format!("unix:/{}", "x".repeat(MAX_PATH_BYTES));
        for (typed, words) in [
            ("", "a port is a number"),
            ("0", "a port is a number"),
            ("65536", "a port is a number"),
            ("+80", "write a port"),
            ("127.0.0.1", "write a port"),
            ("localhost", "write a port"),
            ("127.0.0.1:", "a port is a number"),
            ("127.0.0.1:+80", "a port is a number"),
            ("::1:9464", "write a port"),
            ("[::1]", "write a port"),
            ("[eth0]:9464", "write a port"),
            ("http://127.0.0.1:9464", "write a port"),
            ("*:9464", "write a port"),
            ("unix:metrics.sock", "whole path"),
            ("unix:", "whole path"),
            ("/", "whole path"),
            (&long, "whole path"),
        ] {
            let error = typed.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(words), "{typed}: {error}");
        }
    }
}
