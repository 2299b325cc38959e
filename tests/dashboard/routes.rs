//! Routes and their guard over HTTP: what is answered, with which headers, and to whom.

use std::io::{BufRead, BufReader};

use contraflow::dashboard::openapi;
use serde_json::json;

use crate::http::{ask, get, head, send};
use crate::{record, serve, shown};

#[test]
fn every_path_of_the_document_answers_as_it_says() {
    let dashboard = serve(vec![shown(3)], "127.0.0.1:0", None);
    let document = get(dashboard.address(), "/api/v1/openapi.json").json();
    assert_eq!(document, openapi(false));
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 12, "{paths:?}");
    for (path, methods) in paths {
        let media = methods["get"]["responses"]["200"]["content"].as_object().unwrap().keys().next().unwrap();
        let named = path.replace("{run}", "tiny");
        if media == "text/event-stream" {
            continue;
        }
        let answer = get(dashboard.address(), &named);
        assert_eq!(answer.status, 200, "{named}: {}", answer.body);
        assert!(answer.headers["content-type"].starts_with(media.as_str()), "{named}: {:?}", answer.headers);
        if path.contains("{run}") {
            let unknown = get(dashboard.address(), &path.replace("{run}", "another"));
            assert_eq!(unknown.status, 404, "{path}");
            assert!(unknown.json()["faults"][0].as_str().unwrap().contains("another"));
        }
    }
    let ids: Vec<_> = paths.values().map(|path| path["get"]["operationId"].as_str().unwrap()).collect();
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len());
}

#[test]
fn every_answer_has_the_headers_that_keep_other_sites_out() {
    let dashboard = serve(vec![shown(1)], "127.0.0.1:0", None);
    for path in [
        "/",
        "/run/tiny/pipeline",
        "/nowhere",
        "/assets/app.js",
        "/assets/nothing",
        "/metrics",
        "/api/v1/runs/x",
    ] {
        let answer = get(dashboard.address(), path);
        let policy = &answer.headers["content-security-policy"];
        assert!(
            policy.contains("default-src 'none'") && policy.contains("script-src 'self'"),
            "{path}: {policy}"
        );
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(answer.headers["x-frame-options"], "DENY", "{path}");
        assert!(!answer.headers.contains_key("access-control-allow-origin"), "{path}");
    }
    let status = |path| get(dashboard.address(), path).status;
    assert_eq!(
        [status("/"), status("/run/tiny"), status("/nowhere"), status("/assets/nothing")],
        [200, 200, 404, 404]
    );
}

#[test]
fn a_page_of_another_name_is_refused() {
    let dashboard = serve(vec![shown(1)], "127.0.0.1:0", None);
    for path in ["/", "/metrics", "/api/v1/runs/tiny", "/assets/app.js"] {
        let answer = ask(dashboard.address(), "GET", path, &[("host", "rebound.example")], "");
        assert_eq!((answer.status, answer.body.contains("loss")), (421, false), "{path}");
    }
    assert_eq!(ask(dashboard.address(), "GET", "/api/v1", &[("host", "localhost:9")], "").status, 200);
}

#[test]
fn off_loopback_nothing_is_shown_without_the_token() {
    let secret = "a-secret-of-some-length";
    let dashboard = serve(vec![shown(1)], "0.0.0.0:0", Some(secret));
    let address = format!("127.0.0.1:{}", dashboard.address().port()).parse().unwrap();
    let host = ("host", "node7:7080");
    let with = |headers: &[(&str, &str)], path: &str| {
        let headers: Vec<_> = headers.iter().copied().chain([host]).collect();
        ask(address, "GET", path, &headers, "").status
    };
    for path in ["/api/v1", "/api/v1/runs/tiny", "/api/v1/runs/tiny/live", "/api/v1/openapi.json", "/metrics"]
    {
        assert_eq!(with(&[], path), 401, "{path}");
    }
    assert_eq!(with(&[], "/"), 200, "the page itself, which asks for it");
    assert_eq!(with(&[("authorization", "Bearer a-secret-of-some-length")], "/metrics"), 200);
    assert_eq!(with(&[("authorization", "Bearer another-secret-of-length")], "/metrics"), 401);

    let log_in = |token: &str, headers: &[(&str, &str)]| {
        let headers: Vec<_> = headers.iter().copied().chain([host]).collect();
        ask(address, "POST", "/login", &headers, &json!({"token": token}).to_string())
    };
    let action = ("x-contraflow-action", "1");
    assert_eq!(log_in(secret, &[]).status, 403, "as a form of another site would send it");
    assert_eq!(log_in(secret, &[action, ("origin", "http://evil.example")]).status, 403);
    let refused = log_in("wrong", &[action]);
    assert_eq!((refused.status, refused.headers.contains_key("set-cookie")), (401, false));
    let cookie = log_in(secret, &[action]).headers["set-cookie"].clone();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let pair = cookie.split(';').next().unwrap();
    assert_eq!(with(&[("cookie", pair)], "/api/v1/runs/tiny"), 200);
}

#[test]
fn nothing_of_a_run_can_be_changed() {
    let dashboard = serve(vec![shown(1)], "127.0.0.1:0", None);
    let host = dashboard.address().to_string();
    for (path, method) in [("/api/v1/runs/tiny", "POST"), ("/api/v1/runs/tiny", "DELETE"), ("/api/v1", "PUT")]
    {
        let answer =
            ask(dashboard.address(), method, path, &[("host", &host), ("x-contraflow-action", "1")], "");
        assert_eq!(answer.status, 405, "{method} {path}");
    }
}

#[test]
fn the_live_stream_brings_what_is_missing_and_then_each_step() {
    let run = shown(3);
    let dashboard = serve(vec![run.clone()], "127.0.0.1:0", None);
    let host = dashboard.address().to_string();
    let tcp = send(dashboard.address(), "GET", "/api/v1/runs/tiny/live?after=1", &[("host", &host)], "");
    let mut reader = BufReader::new(tcp);
    let (status, headers) = head(&mut reader);
    assert_eq!((status, headers["content-type"].as_str()), (200, "text/event-stream"));
    let mut next = || {
        let mut line = String::new();
        // Pieces of the body have their lengths in front.
        while !(line.starts_with("data: ") && line.contains("points")) {
            line.clear();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the stream has ended");
        }
        let data: serde_json::Value = serde_json::from_str(line["data: ".len()..].trim()).unwrap();
        data["points"]
            .as_array()
            .unwrap()
            .iter()
            .map(|point| point["step"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(next(), [2, 3]);
    run.step(&record(4));
    assert_eq!(next(), [4]);
}

#[test]
fn what_makes_no_sense_is_refused_with_every_fault_and_views_that_are_not_there_say_why() {
    let dashboard = serve(vec![shown(2)], "127.0.0.1:0", None);
    let faults = get(dashboard.address(), "/api/v1/runs/tiny/series?figures=loss,depth&axis=x&points=many");
    assert_eq!(
        (faults.status, faults.json()["faults"].as_array().unwrap().len()),
        (400, 3),
        "{}",
        faults.body
    );
    let absent = get(dashboard.address(), "/api/v1/runs/tiny/pipeline?view=recorded");
    assert_eq!(absent.status, 404, "{}", absent.body);
    assert!(absent.body.contains("recorded"), "{}", absent.body);
    let simulated = get(dashboard.address(), "/api/v1/runs/tiny/pipeline?view=operations").json();
    let lanes = simulated["ranks"][0]["lanes"].as_array().unwrap();
    let names: Vec<_> = lanes.iter().map(|lane| lane["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"compute") && names.contains(&"all-to-all"), "{names:?}");
    let csv = get(dashboard.address(), "/api/v1/runs/tiny/series.csv").body;
    assert_eq!(csv.lines().count(), 3);
    assert!(csv.starts_with("step,tokens,training_seconds,unix_ms,loss,"), "{csv}");
}
