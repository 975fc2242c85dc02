# Countersign. The two commands to know: make demo, make test.
SHELL := /bin/bash
GO    ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: help demo test build image race fuzz lint integration bench generate man clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: ## Three members, an agent, two pods; a new root, the leader dies; nothing stops (KEEP=1 leaves it running)
	@$(GO) run ./integration/demo

test: ## Unit, conformance and process tests, race detector on
	$(GO) test -race -timeout 20m ./...

# PKCS#11 needs cgo; the clouds' keys need TAGS="aws gcp azure".
CGO_ENABLED ?= 0
TAGS ?=
build: ## Both binaries, static, into bin/ (CGO_ENABLED=1 for PKCS#11; TAGS="aws gcp azure")
	CGO_ENABLED=$(CGO_ENABLED) $(GO) build -trimpath -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

PUSH ?=
image: ## Container images for amd64 and arm64 with their bills of materials, into bin/image/ (PUSH=registry/repo pushes them)
	cd deploy/image && $(GO) run . -root ../.. -out ../../bin/image -version $(VERSION) $(if $(PUSH),-push $(PUSH))

race: ## The tests again, three times over
	$(GO) test -race -count 3 -timeout 30m ./...

FUZZTIME ?= 20s
fuzz: ## Every fuzzer for FUZZTIME
	@set -e; for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz || true); do \
	    echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p; done; done

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
lint: ## Formatting, vet, staticcheck, tidy module files
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt-ed:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags 'aws gcp azure' ./seal ./ca/... ./cmd/countersign
	$(GO) vet -tags 'integration faults' ./integration/... ./cmd/countersign
	cd deploy/image && $(GO) vet ./... && $(GO) mod tidy -diff
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff

integration: ## A whole Kubernetes, mount namespaces, faults, clients not ours (root; installs what it needs)
	./integration/run

bench: ## Measure what docs/BENCHMARKS.md shows, and say what is short of its bar
	$(GO) run ./integration/bench

PROTOC_GEN_GO      := google.golang.org/protobuf/cmd/protoc-gen-go
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
generate: ## Go from the .proto files (needs protoc)
	@d=$$(mktemp -d) && GOBIN=$$d $(GO) install $(PROTOC_GEN_GO) && GOBIN=$$d $(GO) install $(PROTOC_GEN_GO_GRPC) && \
	PATH=$$d:$$PATH protoc -I . --go_out=. --go_opt=module=countersign.io/countersign --go-grpc_out=. --go-grpc_opt=module=countersign.io/countersign api/*/v1/*.proto; \
	rm -rf $$d

MANDIR ?= $(CURDIR)/bin/man/man1
man: ## Man pages of every command, into MANDIR (default bin/man/man1)
	$(GO) test -count 1 -run '^TestManPages$$' ./cmd/countersign ./cmd/countersign-agent -args -man $(MANDIR) -manversion $(VERSION)

clean: ## Remove what was built
	rm -rf bin integration/kube/bin integration/helm/bin integration/gvisor/bin
