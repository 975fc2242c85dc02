package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign.io/countersign/attestor/node"
	"countersign.io/countersign/integration/cluster"
)

// readiness is an answer of /ready: its code, and why not.
func readiness(ctx context.Context, health string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/ready", nil)
	if err != nil {
		return 0, "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 4096))
	return res.StatusCode, string(body), err
}

func untilReady(t *testing.T, ctx context.Context, p *cluster.Process, health string) {
	t.Helper()
	for {
		code, why, err := readiness(ctx, health)
		if code == http.StatusOK {
			return
		}
		select {
		case <-p.Done():
			t.Fatalf("%s ended before it was ready", p.Name)
		case <-ctx.Done():
			t.Fatalf("%s is not ready: %v %s", p.Name, err, why)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// joinFile writes a server's join token and returns the line that names it.
func (p *place) joinFile(t *testing.T, token string) string {
	t.Helper()
	file := filepath.Join(p.Member.Dir, "join")
	writeFile(t, file, []byte(token))
	return "join_token_file: " + file + "\n"
}

func (p *place) notJoined(t *testing.T, token string, code int, words ...string) {
	t.Helper()
	said := p.notStarted(t, p.joinFile(t, token), code, words...)
	if parsed, err := node.ParseToken(token); err == nil && strings.Contains(said, parsed.Secret) {
		t.Errorf("it said the token's secret: %s", said)
	}
}

// TestStartJoinTokens tries to join with tokens that do not fit, as a member and as an agent.
func TestStartJoinTokens(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	foreign := newPlace(t, "ca-1", "") // another cluster of the same trust domain's name
	foreign.start(t, w.ctx, "")
	create := func(args ...string) string { return w.admin(append([]string{"token", "create"}, args...)...) }

	t.Run("used", func(t *testing.T) {
		token := create("--agent")
		newPlace(t, "", "").agentStarts(t, w.ctx, token).Stop()
		newPlace(t, "", "").agentRefused(t, token, nil, exitFailure, "was used at", "make another one")
		// A name that is taken costs no token; what a spent one says is in TestStartJoinBrokenOff.
		p := newPlace(t, "ca-1", "")
		token = create("--server")
		for range 2 {
			p.notJoined(t, token, exitFailure, `member "ca-1"`, "choose another name")
		}
	})
	t.Run("expired", func(t *testing.T) {
		server, agent := create("--server", "--ttl", "1s"), create("--agent", "--ttl", "1s")
		<-time.After(2 * time.Second) // times are whole seconds in the token's record
		newPlace(t, "ca-2", "").notJoined(t, server, exitDenied, "expired at", "make another one")
		newPlace(t, "", "").agentRefused(t, agent, nil, exitDenied, "expired at", "make another one")
	})
	t.Run("for the wrong purpose", func(t *testing.T) {
		server, agent := create("--server"), create("--agent")
		newPlace(t, "ca-2", "").notJoined(t, agent, exitUsage, "admits an agent", "countersign token create --server")
		newPlace(t, "", "").agentRefused(t, server, nil, exitUsage, "admits a server", "countersign token create --agent")
		// Nor by saying that it is for the other: the cluster knows better, and the token is not used up by it.
		newPlace(t, "ca-2", "").notJoined(t, edited(t, agent, func(k *node.Token) { k.Purpose = "server" }), exitDenied, "admits one agent, not one server")
		newPlace(t, "", "").agentStarts(t, w.ctx, agent).Stop()
	})
	t.Run("of another cluster", func(t *testing.T) {
		other := func(purpose string) string {
			out, err := foreign.Member.Admin(w.ctx, bin, "token", "create", purpose)
			if err != nil {
				t.Fatal(err)
			}
			return edited(t, out, func(k *node.Token) { k.Addresses = []string{w.Members[0].Address} })
		}
		newPlace(t, "ca-2", "").notJoined(t, other("--server"), exitDenied, "CA pin", "another cluster")
		// An agent goes on: the address may come to lead to the right cluster. It says why it is not ready.
		p := newPlace(t, "", "")
		var out bytes.Buffer
		proc, err := p.Cluster.Start("agent", nil, &out, filepath.Join(bin, "countersign-agent"), "run", "-c", p.agentFile(t, other("--agent"), nil))
		if err != nil {
			t.Fatal(err)
		}
		w.eventually("the agent says that the pin is wrong", func() error {
			if code, why, err := readiness(w.ctx, p.Health); code != http.StatusServiceUnavailable || !strings.Contains(why, "pin") {
				return fmt.Errorf("%d %s %v", code, why, err)
			}
			return nil
		})
		if proc.Stop(); proc.Code() != 0 {
			t.Errorf("stopped: exit code %d: %s", proc.Code(), out.String())
		}
	})
	t.Run("of another trust domain", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		p.yaml = strings.Replace(p.yaml, "trust_domain: "+trustDomain, "trust_domain: other.test", 1)
		p.notJoined(t, create("--server"), exitDenied, `trust domain "process.test", not "other.test"`)
	})
	t.Run("garbage", func(t *testing.T) {
		good := create("--server")
		for name, token := range map[string]string{"empty": "", "not a token": "hello", "cut": good[:len(good)-9], "changed": good[:20] + "_" + good[21:], "two": good + good} {
			p := newPlace(t, "ca-2", "")
			p.notJoined(t, token, exitUsage, "join_token_file", "join token")
			newPlace(t, "", "").agentRefused(t, token, nil, exitUsage, "attest.join_token_file", "join token")
			if t.Failed() {
				t.Fatal(name)
			}
		}
	})
	t.Run("in a file that others can read", func(t *testing.T) {
		p := newPlace(t, "ca-2", "")
		more := p.joinFile(t, create("--server"))
		chmod(t, filepath.Join(p.Member.Dir, "join"), 0o644)
		p.notStarted(t, more, exitFailure, "join_token_file", "chmod 0600 ")
	})
	t.Run("no file", func(t *testing.T) {
		newPlace(t, "ca-2", "").notStarted(t, "join_token_file: /absent\n", exitFailure, "join_token_file", "/absent")
	})
	t.Run("nobody there", func(t *testing.T) {
		dead := edited(t, create("--server"), func(k *node.Token) { k.Addresses = []string{freeAddress(t)} })
		newPlace(t, "ca-2", "").notJoined(t, dead, exitUnavailable, "joining by 127.0.0.1", "connection refused")
	})
}

func edited(t *testing.T, token string, edit func(*node.Token)) string {
	t.Helper()
	k, err := node.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	edit(&k)
	out, err := node.FormatToken(k)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestStartJoinBrokenOff kills joining members at each step. What is left either takes part at the next start, or says what to
// do; and doing that helps.
func TestStartJoinBrokenOff(t *testing.T) {
	t.Parallel()
	w := worldOf(t, 1, "")
	admitted := func(name string) bool {
		out, err := w.Members[0].Admin(w.ctx, bin, "status", "-o", "json")
		return err == nil && strings.Contains(out, `"`+name+`"`)
	}
	var brokenOff int
	for i, step := range []string{"admitted", "authorities.json", "member.json"} {
		// Of the parent: who has joined must live, or the cluster loses its quorum.
		p := newPlace(t, fmt.Sprintf("ca-%d", i+2), "")
		t.Run(step, func(t *testing.T) {
			token := w.admin("token", "create", "--server")
			p.configure(t, p.joinFile(t, token))
			var out bytes.Buffer
			proc, err := p.Cluster.Start(p.Name(), nil, &out, filepath.Join(bin, "countersign"), "server", "run", "-c", filepath.Join(p.Member.Dir, "server.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			reached := func() bool {
				if step == "admitted" {
					return admitted(p.Name())
				}
				_, err := os.Stat(p.data(step))
				return err == nil
			}
			for !reached() && !proc.Exited() && w.ctx.Err() == nil {
				time.Sleep(50 * time.Microsecond)
			}
			proc.Kill()
			if _, err := os.Stat(p.data("member.json")); errors.Is(err, os.ErrNotExist) && (admitted(p.Name()) || !reached()) {
				// The token is spent last: it may be good still, or not any more.
				brokenOff++
				t.Logf("after the first start: %s", out.String())
				p.configure(t, p.joinFile(t, token))
				if err := p.RestartMember(w.ctx, p.Member); err == nil {
					untilVoter(t, w, p.Name())
					return
				}
				p.notJoined(t, token, exitFailure, "was used at", "make another one")
				token = w.admin("token", "create", "--server")
			}
			p.start(t, w.ctx, p.joinFile(t, token))
			untilVoter(t, w, p.Name())
		})
	}
	t.Logf("%d of the joins broke off between the token's end and the folder's completion", brokenOff)

	t.Run("a cluster of its own instead", func(t *testing.T) {
		// Without its token, what is left of a join must not mix with a cluster that the member then begins.
		p := newPlace(t, "ca-1", "")
		if err := os.Mkdir(p.data(""), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"authorities.json", "keyring", "kek"} {
			from, err := os.ReadFile(filepath.Join(w.Members[0].Dir, "data", f))
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, p.data(f), from)
		}
		p.start(t, w.ctx, "")
		var mine, theirs struct {
			CAPin string `json:"ca_pin"`
		}
		out, err := p.Member.Admin(w.ctx, bin, "bundle", "show", "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		parseJSON(t, out, &mine)
		parseJSON(t, w.admin("bundle", "show", "-o", "json"), &theirs)
		if mine.CAPin == "" || mine.CAPin == theirs.CAPin {
			t.Errorf("the new cluster has the pin %q, the other %q", mine.CAPin, theirs.CAPin)
		}
	})
}

// Name is the member's: both of a place's parts have one.
func (p *place) Name() string { return p.Member.Name }

func untilVoter(t *testing.T, w *world, name string) {
	t.Helper()
	last := ""
	for w.ctx.Err() == nil {
		out, err := w.Members[0].Admin(w.ctx, bin, "status", "-o", "json")
		if err == nil {
			var s cluster.Status
			if err := json.Unmarshal([]byte(out), &s); err != nil {
				t.Fatal(err)
			}
			for _, m := range s.Members {
				if m.ID == name && m.Voter {
					return
				}
			}
		}
		last = fmt.Sprint(out, err)
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("%s did not become a voter: %s", name, last)
}

func parsedToken(t *testing.T, token string) node.Token {
	t.Helper()
	k, err := node.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
