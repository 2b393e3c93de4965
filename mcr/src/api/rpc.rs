//! JSON-RPC 2.0 lines to typed calls and back: pure, no socket.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::wire::{Error, Request, code};

/// What one line of a client asks for.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// To be answered under the id.
    Call { id: Value, request: Request },
    /// A request without an id: carried out, never answered.
    Notification(Request),
    /// Not understood; answered under the id, `null` if it has none to be found.
    Refused { id: Value, error: Error },
    /// A notification that was not understood, and that the specification leaves without an answer.
    Ignored(Error),
}

/// Reads a request line.
pub fn parse(line: &[u8]) -> Incoming {
    let refused = |id, code, message: String| Incoming::Refused { id, error: Error { code, message } };
    let mut object = match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => object,
        Ok(Value::Array(_)) => {
            let message = "batches are not served: send one request a line, they are answered in order";
            return refused(Value::Null, code::INVALID_REQUEST, message.to_owned());
        }
        Ok(_) => {
            let message = "a request is a JSON object";
            return refused(Value::Null, code::INVALID_REQUEST, message.to_owned());
        }
        Err(error) => return refused(Value::Null, code::PARSE, format!("the line is no JSON: {error}")),
    };
    let id = object.remove("id");
    if !matches!(id, None | Some(Value::Null | Value::String(_) | Value::Number(_))) {
        let message = "an id is a string or a number";
        return refused(Value::Null, code::INVALID_REQUEST, message.to_owned());
    }
    match envelope(object) {
        Err(error) => Incoming::Refused { id: id.unwrap_or(Value::Null), error },
        Ok((method, params)) => match (typed(&method, params), id) {
            (Ok(request), Some(id)) => Incoming::Call { id, request },
            (Ok(request), None) => Incoming::Notification(request),
            (Err(error), Some(id)) => Incoming::Refused { id, error },
            (Err(error), None) => Incoming::Ignored(error),
        },
    }
}

/// Method and parameters of a request object.
fn envelope(mut object: Map<String, Value>) -> Result<(String, Map<String, Value>), Error> {
    let invalid = |message: &str| Error { code: code::INVALID_REQUEST, message: message.to_owned() };
    if object.remove("jsonrpc").is_none_or(|version| version != "2.0") {
        return Err(invalid("a request has \"jsonrpc\":\"2.0\""));
    }
    let Some(Value::String(method)) = object.remove("method") else {
        return Err(invalid("a request has a \"method\", a string"));
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => return Err(invalid("\"params\" are an object: parameters have names")),
    };
    match object.keys().next() {
        None => Ok((method, params)),
        Some(key) => Err(invalid(&format!("a request has no \"{key}\""))),
    }
}

fn typed(method: &str, params: Map<String, Value>) -> Result<Request, Error> {
    match method {
        "ping" => none(method, &params, Request::Ping),
        "status" => none(method, &params, Request::Status),
        "stop" => some(method, params).map(Request::Stop),
        "rule.add" => some(method, params).map(Request::RuleAdd),
        "rule.set" => some(method, params).map(Request::RuleSet),
        "rule.remove" => some(method, params).map(Request::RuleRemove),
        "rule.list" => none(method, &params, Request::RuleList),
        "rule.show" => some(method, params).map(Request::RuleShow),
        "stats" => some(method, params).map(Request::Stats),
        "workers" => none(method, &params, Request::Workers),
        "config.show" => none(method, &params, Request::ConfigShow),
        "config.load" => some(method, params).map(Request::ConfigLoad),
        "config.confirm" => none(method, &params, Request::ConfigConfirm),
        "config.rollback" => none(method, &params, Request::ConfigRollback),
        "config.save" => none(method, &params, Request::ConfigSave),
        "events.subscribe" => none(method, &params, Request::EventsSubscribe),
        "log_level.get" => none(method, &params, Request::LogLevelGet),
        "log_level.set" => some(method, params).map(Request::LogLevelSet),
        _ => Err(Error { code: code::METHOD_NOT_FOUND, message: format!("there is no method '{method}'") }),
    }
}

fn none(method: &str, params: &Map<String, Value>, request: Request) -> Result<Request, Error> {
    match params.keys().next() {
        None => Ok(request),
        Some(key) => Err(invalid_params(method, &format!("takes no parameters, but '{key}' was given"))),
    }
}

fn some<T: DeserializeOwned>(method: &str, params: Map<String, Value>) -> Result<T, Error> {
    serde_path_to_error::deserialize(Value::Object(params)).map_err(|error| {
        let path = error.path().to_string();
        let why = error.into_inner();
        // A missing or unknown field is named by the message itself.
        if path == "." || why.to_string().contains(&format!("field `{path}`")) {
            invalid_params(method, &why.to_string())
        } else {
            invalid_params(method, &format!("field `{path}`: {why}"))
        }
    })
}

fn invalid_params(method: &str, why: &str) -> Error {
    Error { code: code::INVALID_PARAMS, message: format!("{method}: {why}") }
}

/// A request line, newline included.
pub fn request_line(id: u64, request: &Request) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    struct Envelope<'a> {
        jsonrpc: &'static str,
        id: u64,
        #[serde(flatten)]
        request: &'a Request,
    }
    line(&Envelope { jsonrpc: "2.0", id, request })
}

/// A response line, newline included.
pub fn response_line(id: &Value, outcome: Result<Value, Error>) -> Vec<u8> {
    let mut response = match outcome {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}).to_string(),
        Err(error) => json!({"jsonrpc": "2.0", "id": id, "error": error}).to_string(),
    };
    response.push('\n');
    response.into_bytes()
}

/// A notification line, newline included.
pub fn notification_line(method: &str, params: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    line(&Notification { jsonrpc: "2.0", method, params })
}

fn line(message: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// A response as its client reads it.
#[derive(Debug, Deserialize)]
pub struct Response<T> {
    pub jsonrpc: String,
    /// `null` where the server could not tell which request it answers.
    pub id: Option<u64>,
    pub result: Option<T>,
    pub error: Option<Error>,
}

/// A request of the server's that nobody answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Notification<T, S = String> {
    pub jsonrpc: S,
    pub method: S,
    pub params: T,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::wire::{ConfigLoad, LogLevel, RuleChange, RuleRef, RuleRemoval, RuleSpec, StatsQuery, Stop},
        config::Source,
    };

    fn refusal(line: &str) -> (Value, i32, String) {
        match parse(line.as_bytes()) {
            Incoming::Refused { id, error } => (id, error.code, error.message),
            other => panic!("{line} was not refused: {other:?}"),
        }
    }

    #[test]
    fn every_request_arrives_as_it_was_sent() {
        let name = || "cam1".to_owned();
        let requests = [
            Request::Ping,
            Request::Status,
            Request::Stop(Stop { keep: true }),
            Request::RuleAdd(RuleSpec {
                input: name(),
                datapath: Some("auto".to_owned()),
                ..Default::default()
            }),
            Request::RuleSet(RuleChange { name: name(), ..Default::default() }),
            Request::RuleRemove(RuleRemoval { name: name(), save: false }),
            Request::RuleList,
            Request::RuleShow(RuleRef { name: name() }),
            Request::Stats(StatsQuery { rule: Some(name()) }),
            Request::Stats(StatsQuery::default()),
            Request::Workers,
            Request::ConfigShow,
            Request::ConfigLoad(ConfigLoad {
                sources: vec![Source { file: name(), text: name() }],
                dry_run: true,
                confirm_within_s: Some(9),
            }),
            Request::ConfigConfirm,
            Request::ConfigRollback,
            Request::ConfigSave,
            Request::EventsSubscribe,
            Request::LogLevelGet,
            Request::LogLevelSet(LogLevel { level: "debug".to_owned() }),
        ];
        for request in requests {
            let line = request_line(7, &request).unwrap();
            assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
            assert_eq!(parse(&line), Incoming::Call { id: json!(7), request });
        }
    }

    #[test]
    fn parameters_may_be_absent_where_none_are_needed() {
        for params in ["", r#","params":{}"#, r#","params":null"#] {
            for (method, request) in
                [("ping", Request::Ping), ("stats", Request::Stats(StatsQuery::default()))]
            {
                let line = format!(r#"{{"jsonrpc":"2.0","id":"a","method":"{method}"{params}}}"#);
                assert_eq!(parse(line.as_bytes()), Incoming::Call { id: json!("a"), request });
            }
        }
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (line, id, code, message) in [
            ("[]", json!(null), code::INVALID_REQUEST, "batches are not served"),
            ("7", json!(null), code::INVALID_REQUEST, "a request is a JSON object"),
            ("GET / HTTP/1.1\r", json!(null), code::PARSE, "the line is no JSON: expected value"),
            ("", json!(null), code::PARSE, "the line is no JSON"),
            (r#"{"id":{},"method":"ping"}"#, json!(null), code::INVALID_REQUEST, "an id is"),
            (r#"{"id":1,"method":"ping"}"#, json!(1), code::INVALID_REQUEST, "\"jsonrpc\":\"2.0\""),
            (r#"{"jsonrpc":"2.0","id":1}"#, json!(1), code::INVALID_REQUEST, "a \"method\""),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"rule.show","params":["cam1"]}"#,
                json!(1),
                code::INVALID_REQUEST,
                "\"params\" are an object",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"rule.list","parms":{}}"#,
                json!(1),
                code::INVALID_REQUEST,
                "a request has no \"parms\"",
            ),
            (
                r#"{"jsonrpc":"2.0","id":"x","method":"rule.ad"}"#,
                json!("x"),
                code::METHOD_NOT_FOUND,
                "there is no method 'rule.ad'",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"ping","params":{"now":true}}"#,
                json!(1),
                code::INVALID_PARAMS,
                "ping: takes no parameters, but 'now' was given",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"rule.add","params":{"in":"a","out":["b",5]}}"#,
                json!(1),
                code::INVALID_PARAMS,
                "rule.add: field `out[1]`: invalid type: integer `5`, expected a string",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"rule.add","params":{"in":"a"}}"#,
                json!(1),
                code::INVALID_PARAMS,
                "rule.add: missing field `out`",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"rule.show","params":{"nam":"a"}}"#,
                json!(1),
                code::INVALID_PARAMS,
                "rule.show: unknown field `nam`, expected `name`",
            ),
        ] {
            let (got_id, got_code, got_message) = refusal(line);
            assert_eq!((got_id, got_code), (id, code), "{line}: {got_message}");
            assert!(got_message.contains(message), "{line}: {got_message}");
        }
    }

    #[test]
    fn a_notification_gets_no_answer() {
        let line = br#"{"jsonrpc":"2.0","method":"stop"}"#;
        assert_eq!(parse(line), Incoming::Notification(Request::Stop(Stop::default())));
        let line = br#"{"jsonrpc":"2.0","method":"halt"}"#;
        assert!(matches!(parse(line), Incoming::Ignored(_)));
    }

    #[test]
    fn nesting_without_end_is_refused() {
        let (_, code, _) = refusal(&"[".repeat(100_000));
        assert_eq!(code, code::PARSE);
    }
}
