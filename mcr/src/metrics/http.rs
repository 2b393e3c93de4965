//! As much of HTTP/1.1 as pages take that are read and never changed: bytes to a request, an answer to bytes. Pure.

use std::fmt::Write;

/// Header lines that a request may have.
const HEADERS: usize = 64;

/// What a client wants to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Get {
    /// Without what follows a question mark.
    pub path: String,
    /// It wants the headers alone (HEAD).
    pub headers_alone: bool,
    /// It takes the `OpenMetrics` format.
    pub open_metrics: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: Status,
    pub content_type: &'static str,
    pub body: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    BadRequest,
    NotFound,
    MethodNotAllowed,
    TooLarge,
    Unavailable,
}

impl Status {
    const fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

impl Answer {
    /// A page of plain text, of whole lines.
    pub fn text(status: Status, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    /// What goes before the body.
    pub fn head(&self) -> String {
        let mut head = format!("HTTP/1.1 {}\r\n", self.status.line());
        if self.status == Status::MethodNotAllowed {
            head.push_str("Allow: GET, HEAD\r\n");
        }
        // Writing to a string does not fail.
        let _ = write!(
            head,
            "Content-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.content_type,
            self.body.len()
        );
        head
    }
}

/// The request that these bytes begin with; none as long as they are half of one.
///
/// # Errors
///
/// What to answer to bytes that are no request to read.
pub fn parse(bytes: &[u8]) -> Result<Option<Get>, Answer> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => return Ok(None),
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(too_large()),
        Err(error) => return Err(Answer::text(Status::BadRequest, format!("{error}\n"))),
    }
    let headers_alone = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Answer::text(Status::MethodNotAllowed, "there is only GET and HEAD\n")),
    };
    let target = request.path.unwrap_or_default();
    let path = path_of(target).split('?').next().unwrap_or_default().to_owned();
    let accepts = |header: &httparse::Header<'_>| {
        header.name.eq_ignore_ascii_case("accept")
            && String::from_utf8_lossy(header.value)
                .to_ascii_lowercase()
                .contains("application/openmetrics-text")
    };
    let open_metrics = request.headers.iter().any(accepts);
    Ok(Some(Get { path, headers_alone, open_metrics }))
}

/// What follows the authority of a target in absolute form, as proxies are sent it (RFC 9112, 3.2.2).
fn path_of(target: &str) -> &str {
    const SCHEME: &str = "http://";
    if !target.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME)) {
        return target;
    }
    let rest = &target[SCHEME.len()..];
    match rest.find(['/', '?']) {
        Some(at) if rest[at..].starts_with('/') => &rest[at..],
        _ => "/",
    }
}

pub fn too_large() -> Answer {
    Answer::text(Status::TooLarge, "a request has few and short headers here\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood_or_answered() {
        let get = |path: &str, headers_alone, open_metrics| {
            Ok(Some(Get { path: path.to_owned(), headers_alone, open_metrics }))
        };
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        for (bytes, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", get("/metrics", false, false)),
            ("GET /metrics?a=b HTTP/1.0\r\n\r\n", get("/metrics", false, false)),
            ("GET http://x/healthz HTTP/1.1\r\n\r\n", get("/healthz", false, false)),
            ("GET HTTP://[::1]:9464/metrics?a=/b HTTP/1.1\r\n\r\n", get("/metrics", false, false)),
            ("GET http://x HTTP/1.1\r\n\r\n", get("/", false, false)),
            ("GET http://x?a=/metrics HTTP/1.1\r\n\r\n", get("/", false, false)),
            ("HEAD /healthz HTTP/1.1\r\n\r\n", get("/healthz", true, false)),
            (
                "GET /metrics HTTP/1.1\r\naccept: Application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1\r\n\r\n",
                get("/metrics", false, true),
            ),
            (
                "GET /metrics HTTP/1.1\r\nX-Accept: application/openmetrics-text\r\n\r\n",
                get("/metrics", false, false),
            ),
            ("", Ok(None)),
            ("GET /metr", Ok(None)),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", Ok(None)),
            ("POST /metrics HTTP/1.1\r\n\r\n", Err(Status::MethodNotAllowed)),
            ("{\"jsonrpc\":\"2.0\"}\n", Err(Status::BadRequest)),
            ("\x16\x03\x01 a TLS greeting", Err(Status::BadRequest)),
            ("GET / HTTP/2.0\r\n\r\n", Err(Status::BadRequest)),
            (&many, Err(Status::TooLarge)),
        ] {
            assert_eq!(parse(bytes.as_bytes()).map_err(|answer| answer.status), expected, "{bytes:?}");
        }
    }

    #[test]
    fn an_answer_says_how_long_it_is_and_that_it_is_the_last() {
        let answer = Answer::text(Status::Ok, "ready\n");
        let expected = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 6\r\n\
                        Connection: close\r\n\r\n";
        assert_eq!(answer.head(), expected);
        assert!(Answer::text(Status::MethodNotAllowed, "").head().contains("\r\nAllow: GET, HEAD\r\n"));
    }
}
